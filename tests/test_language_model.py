"""Models by every kind of name, and what can be asked of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, files
from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.checkpoint import Checkpoint
from chatwright.commands.import_ import write_model
from chatwright.config import UserError
from chatwright.interop.loaded import Loaded
from chatwright.language_model import LanguageModel, find_checkpoint, load, load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from chatwright.tokenizer.text_frame import TextFrame

HELLO = [Message(role="user", content="Hello")]


@pytest.fixture(scope="module")
def model(chat_dir: Path) -> LanguageModel:
    return load(chat_dir)


# Names


def stage(
    root: Path,
    name: str,
    source: Path,
    *,
    steps: tuple[int, ...] = (1,),
    chosen: int | None = None,
    at: int = 0,
) -> Path:
    """A stage directory with checkpoints; finished when `chosen` names one, `at` seconds after the others."""
    for step in steps:
        shutil.copytree(source, root / name / "checkpoints" / f"step-{step:06}")
    if chosen is not None:
        file = root / name / "result.json"
        file.write_text(json.dumps({"model": f"checkpoints/step-{chosen:06}"}))
        os.utime(file, (1_000_000 + at, 1_000_000 + at))
    return root / name


def found(path: Path) -> str:
    """The checkpoint that a directory stands for, as STAGE/STEP."""
    checkpoint_ = find_checkpoint(path)
    assert checkpoint_ is not None
    return f"{checkpoint_.path.parent.parent.name}/{checkpoint_.step}"


def set_kind(directory: Path, kind: str) -> None:
    state = files.read_json(directory / "state.json")
    files.write_json(directory / "state.json", {**state, "kind": kind})


def test_a_checkpoint_directory_is_itself(chat_dir: Path) -> None:
    assert find_checkpoint(chat_dir) == Checkpoint(chat_dir)


def test_a_finished_stage_names_its_model(tmp_path: Path, chat_dir: Path) -> None:
    """The best one, not the newest."""
    assert found(stage(tmp_path, "ppo", chat_dir, steps=(1, 2, 3), chosen=2)) == "ppo/2"


def test_an_unfinished_stage_is_its_newest_whole_checkpoint(tmp_path: Path, chat_dir: Path) -> None:
    path = stage(tmp_path, "sft", chat_dir, steps=(1, 2, 3))
    assert found(path) == "sft/3"
    (path / "checkpoints" / "step-000003" / "model.safetensors").write_bytes(b"cut")
    assert found(path) == "sft/2"


def test_a_run_is_its_last_finished_language_model(tmp_path: Path, chat_dir: Path) -> None:
    stage(tmp_path, "pretrain", chat_dir, chosen=1, at=1)
    stage(tmp_path, "sft", chat_dir, chosen=1, at=2)
    assert found(tmp_path) == "sft/1"
    reward = stage(tmp_path, "reward", chat_dir, chosen=1, at=3)
    set_kind(reward / "checkpoints" / "step-000001", "reward")
    stage(tmp_path, "ppo", chat_dir, steps=(1, 2))  # not finished
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "result.json").write_text('{"model": null}')
    assert found(tmp_path) == "sft/1"
    stage(tmp_path, "ppo.old-1", chat_dir, chosen=1, at=9)  # moved aside when its settings changed
    assert found(tmp_path) == "sft/1"


def test_directories_that_stand_for_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="holds no model: neither"):
        load_parts(tmp_path)


def test_a_stage_whose_model_is_gone(tmp_path: Path, chat_dir: Path) -> None:
    path = stage(tmp_path, "sft", chat_dir, chosen=7)
    with pytest.raises(UserError, match="step-000007"):
        load_parts(path)
    (path / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json cannot be read"):
        load_parts(path)


def test_a_reward_model_cannot_talk(tmp_path: Path, chat_dir: Path) -> None:
    shutil.copytree(chat_dir, tmp_path / "reward")
    set_kind(tmp_path / "reward", "reward")
    with pytest.raises(UserError, match="a model of kind 'reward', not a language model"):
        load(tmp_path / "reward")


@pytest.mark.parametrize("name", ["no/such", "smolm2", "model.gguf", ""])
def test_names_that_lead_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"no model .*(also known: smollm2, hf:owner/name|did you mean)|holds no model"
    ):
        load(name)


def test_names_reach_their_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def reader(kind: str) -> Any:
        return lambda name: asked.append((kind, str(name))) or Loaded(None, None, None, "x")  # type: ignore[arg-type,func-returns-value]

    monkeypatch.setattr("chatwright.interop.gguf.load_gguf", reader("gguf"))
    monkeypatch.setattr("chatwright.interop.hf.load_hub", reader("hub"))
    monkeypatch.setattr("chatwright.interop.hf.load_hf", reader("hf"))
    monkeypatch.setattr("chatwright.data.archives.smollm2_gguf", lambda: Path("cache/smol.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "config.json").write_text("{}")
    for name in ("smollm2", "hf:owner/name", tmp_path / "x.gguf", tmp_path / "dir"):
        load_parts(name)
    assert asked == [
        ("gguf", str(Path("cache/smol.gguf"))),
        ("hub", "owner/name"),
        ("gguf", str(tmp_path / "x.gguf")),
        ("hf", str(tmp_path / "dir")),
    ]
    with pytest.raises(UserError, match=r"has no tokenizer\.json beside its weights"):
        load("smollm2")


def test_weights_are_those_that_were_saved(chat_dir: Path, model: LanguageModel) -> None:
    tensors = Checkpoint(chat_dir).tensors("model")
    assert "head.weight" not in tensors and model.model.head.weight is model.model.embed.weight
    for name, tensor in checkpoint.model_tensors(model.model).items():
        assert torch.equal(tensor.cpu(), tensors[name])


def test_a_tokenizer_of_another_model(chat_dir: Path, small_tokenizer: Tokenizer) -> None:
    small = GPT(GPTConfig.preset("modern-nano", vocab_size=small_tokenizer.vocab_size - 1))
    with pytest.raises(UserError, match="they do not belong together"):
        LanguageModel(small, small_tokenizer, NATIVE, "x")


# What it can do


def test_logits(model: LanguageModel) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    logits = model.logits(rows)
    assert logits.shape == (2, 3, model.tokenizer.vocab_size) and logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(model.logits(torch.tensor(rows)), logits)
    with torch.no_grad():
        assert torch.equal(model.model(torch.tensor(rows)), logits)


def test_greedy_continuation_is_the_likeliest_tokens(model: LanguageModel) -> None:
    """Worked out token by token without engine and cache."""
    ids = [model.tokenizer.end_of_text_id, *model.tokenizer.encode("Hello")]
    prompt = len(ids)
    for _ in range(6):
        ids.append(int(model.logits([ids])[0, -1].argmax()))
    done = model.complete("Hello", max_new_tokens=6, temperature=0.0)
    assert done.ids == ids[prompt:][: len(done.ids)] and done.ids
    assert done.prompt_tokens == prompt
    assert model.generate("Hello", max_new_tokens=6, temperature=0.0) == done.text


def test_streams_are_the_whole(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 3}
    pieces = list(model.stream("Once", **options))
    assert "".join(piece.text for piece in pieces) == model.generate("Once", **options)
    assert pieces[-1].finish_reason in ("stop", "length") and all(
        piece.finish_reason is None for piece in pieces[:-1]
    )
    chats = list(model.stream_chat(HELLO, **options))
    assert "".join(piece.text for piece in chats) == model.chat(HELLO, **options)


def test_seeds_repeat(model: LanguageModel) -> None:
    one, again, two = (model.generate("x", max_new_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert one == again != two


def test_a_chat_begins_where_the_template_says(model: LanguageModel) -> None:
    request, fitted = model.chat_request(HELLO, max_new_tokens=5, temperature=0.0)
    assert (
        list(request.prompt)
        == NATIVE.encode(HELLO, model.tokenizer, add_generation_prompt=True).ids
        == fitted.ids
    )
    assert request.end_ids == NATIVE.end_ids(model.tokenizer)
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (5, 0.0)


def test_room_is_kept_for_the_answer_but_never_more_than_half(model: LanguageModel) -> None:
    context = model.model.config.context
    talk = [Message(role=("user", "assistant")[n % 2], content="word " * 4) for n in range(21)]
    short, long = (model.encode_chat(talk, max_new_tokens=most) for most in (20, 10_000))
    assert len(short.ids) <= context - 20 and len(long.ids) <= context // 2
    assert long.dropped > short.dropped > 0


def test_a_base_model_does_not_chat(base_dir: Path) -> None:
    base = load(base_dir)
    assert base.template is None
    ids = base.tokenizer.encode("x")
    likeliest = int(base.logits([ids])[0, -1].argmax())
    assert base.generate("x", max_new_tokens=1, temperature=0.0) == base.tokenizer.decode([likeliest])
    for ask in (base.chat, base.encode_chat, base.stream_chat):
        with pytest.raises(UserError, match="has no chat template: it is a base model"):
            ask(HELLO)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 2}, {"max_new_tokens": 0}, {"stop": "x"}])
def test_options_are_checked(model: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"sampling: {next(iter(options))}"):
        model.generate("x", **options)


def test_an_option_that_there_is_none_of_is_answered_with_the_nearest(model: LanguageModel) -> None:
    for ask in (model.generate, model.complete):
        with pytest.raises(
            UserError, match="sampling has no option 'max_new_token'; did you mean 'max_new_tok"
        ):
            ask("hi", max_new_token=3)
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        model.chat([{"role": "user", "content": "hi"}], temprature=0.5)
    with pytest.raises(UserError, match="max_new_tokens is 'many'; it must be a whole number"):
        model.chat([{"role": "user", "content": "hi"}], max_new_tokens="many")


def test_no_random_state_is_touched(model: LanguageModel) -> None:
    before = torch.get_rng_state()
    model.generate("x", max_new_tokens=3, seed=1)
    model.chat(HELLO, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_result_cannot_point_outside_of_its_directory(chat_dir: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    for outside in ("../elsewhere", str(chat_dir.resolve())):
        (stage / "result.json").write_text(json.dumps({"model": outside}))
        with pytest.raises(UserError, match="outside of its directory"):
            find_checkpoint(stage)


# How a text begins, and where an answer ends


def begun(model: LanguageModel, frame: TextFrame) -> LanguageModel:
    return LanguageModel(model.model, model.tokenizer.framed(frame), model.template, "x")


def test_a_text_begins_as_its_makers_say(model: LanguageModel) -> None:
    ids = model.tokenizer.encode("Hello")
    begin, close = model.tokenizer.control_ids["<|system|>"], model.tokenizer.control_ids["<|tool|>"]
    assert begun(model, TextFrame()).prompt_request("Hello").prompt == (*ids,)
    framed = begun(model, TextFrame((begin, begin), (close,)))
    assert framed.prompt_request("Hello").prompt == (begin, begin, *ids, close)
    typed = framed.prompt_request("<|system|>").prompt  # text stays text
    assert typed == (begin, begin, *model.tokenizer.encode("<|system|>"), close) and len(typed) > 4


def test_the_empty_text_can_be_continued_by_every_model(model: LanguageModel) -> None:
    """Where nothing stands in front of a text, one begins where another ended."""
    nothing = begun(model, TextFrame()).prompt_request("")
    assert nothing.prompt == (model.tokenizer.end_of_text_id,) and not nothing.continues
    assert model.prompt_request("Hello").continues


def test_all_ends_end_an_answer(model: LanguageModel) -> None:
    """In a chat and in a text: the end of text, the template's, and those that the makers name."""
    tool = model.tokenizer.control_ids["<|tool|>"]
    named = begun(model, model.tokenizer.frame.with_ends([tool, 10**6], "generation_config.json"))
    expected = {model.tokenizer.end_of_text_id, model.tokenizer.control_ids["<|end|>"], tool}
    assert named.prompt_request("Hello").end_ids == expected
    assert named.chat_request(HELLO)[0].end_ids == expected == named.end_ids


def test_a_checkpoint_keeps_what_stands_around_a_text(chat_dir: Path, tmp_path: Path) -> None:
    parts = load_parts(chat_dir)
    assert parts.tokenizer is not None
    tool = parts.tokenizer.control_ids["<|tool|>"]
    frame = TextFrame((tool,), (), ((tool, "config.json"),), "add_bos_token")
    write_model(replace(parts, tokenizer=parts.tokenizer.framed(frame)), tmp_path / "m", source="x")
    again = load_parts(tmp_path / "m").tokenizer
    assert again is not None and again.frame == frame and again.encode_text("")[0] == tool


def test_a_checkpoint_of_an_earlier_version_goes_on_as_before(chat_dir: Path, tmp_path: Path) -> None:
    """Its state.json says nothing of texts; models trained here began with the end-of-text token."""
    shutil.copytree(chat_dir, tmp_path / "old")
    state = json.loads((tmp_path / "old" / "state.json").read_text())
    for name in ("texts", "end_of_text"):
        state.pop(name, None)
    state["files"].pop("state.json")
    (tmp_path / "old" / "state.json").write_text(json.dumps(state))
    old = load_parts(tmp_path / "old").tokenizer
    assert old is not None and old.encode_text("")[:1] == [old.end_of_text_id]


# What a chat template is given


def with_template(model: LanguageModel, source: str) -> LanguageModel:
    return LanguageModel(model.model, model.tokenizer, ChatTemplate(source), "x")


def test_an_answer_stops_at_the_text_that_ends_a_turn(model: LanguageModel) -> None:
    own = with_template(
        model,
        "{% for m in messages %}[{{ m.role | upper }}]{{ m.content }}[/{{ m.role | upper }}]{% endfor %}",
    )
    request, _ = own.chat_request(HELLO, max_new_tokens=4, stop=("x",))
    assert request.sampling.stop == ("x", "[/ASSISTANT]")
    assert model.chat_request(HELLO, max_new_tokens=4)[0].sampling.stop == ()


def test_tools_documents_and_variables_reach_the_template(model: LanguageModel) -> None:
    own = with_template(model, NATIVE.source + "{{ tools | length }}{{ documents[0].title }}{{ tone }}")
    given: dict[str, Any] = {"tools": [{}, {}], "documents": [{"title": "T"}], "variables": {"tone": "loud"}}
    request, _ = own.chat_request(HELLO, max_new_tokens=4, temperature=0.0, **given)
    assert model.tokenizer.decode(request.prompt).endswith("2Tloud") and request.sampling.temperature == 0.0
    assert isinstance(own.chat(HELLO, max_new_tokens=1, **given), str)


def test_a_last_message_that_the_model_goes_on_with(model: LanguageModel) -> None:
    begun = [*HELLO, Message(role="assistant", content="I am ")]
    request, _ = model.chat_request(begun, max_new_tokens=4, continue_final_message=True)
    assert request.prompt == tuple(NATIVE.encode(begun, model.tokenizer).ids[:-1])


def test_a_message_reaches_the_template_as_it_is(model: LanguageModel) -> None:
    """With what stands beside its content; in our own form only where the template has none for it."""
    talk: list[Any] = [{"role": "user", "content": "Hello", "name": "Ann"}]
    own = with_template(
        model, "{% for m in messages %}<|user|>{{ m.name }}: {{ m.content }}<|end|>{% endfor %}"
    )
    assert model.tokenizer.decode(own.chat_request(talk, max_new_tokens=4)[0].prompt) == "Ann: Hello"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk.append({"role": "assistant", "content": None, "tool_calls": [call]})
    prompt = model.tokenizer.decode(model.chat_request(talk, max_new_tokens=4)[0].prompt)
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in prompt
