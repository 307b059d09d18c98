"""The verbs `import` and `doctor`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from chatwright import checkpoint, cli, metrics
from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.config import UserError
from chatwright.language_model import load, load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.serve import doctor_model, tools
from chatwright.serve.doctor import mask_picture
from chatwright.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        out = io.StringIO()
        monkeypatch.setattr(metrics, "console", Console(file=out, highlight=False, width=200, force_terminal=False))
        monkeypatch.setattr(doctor_model, "console", metrics.console)
        code = cli.main([str(argument) for argument in arguments])
        printed, err = capsys.readouterr()
        return code, out.getvalue() + printed, err

    return call


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, taught: tuple[GPT, Tokenizer]) -> Path:
    """A model that has learnt its dialogues, as a model directory."""
    return save(tmp_path_factory.mktemp("good") / "model", *taught)


def save(target: Path, model: GPT, tokenizer: Tokenizer, source: str | None = NATIVE.source, mark: str = "") -> Path:
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": mark or tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json()}
    if source is not None:
        texts["chat_template.jinja"] = source
    checkpoint.save_checkpoint(target, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts)
    return target


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """The good model, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 as transformers saves it, with a tokenizer and a chat template that ends turns with its eos."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.train(["Hello there! Are you there?"] * 4, 300)
    tokenizer.save(directory)
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token="<|endoftext|>", chat_template=template
    ).save_pretrained(directory)
    return directory


# import


def test_import_of_a_hugging_face_directory(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    """Written, moved elsewhere, and then the same ids and the same logits as what was imported."""
    code, out, err = run("import", hf_dir, tmp_path / "made")
    assert (code, err) == (0, "") and "the same tokens and the same logits" in out
    moved = Path(shutil.move(tmp_path / "made", tmp_path / "moved"))
    assert {path.name for path in moved.iterdir()} <= tools.OURS
    ours, theirs = load(moved), load(hf_dir)
    assert ours.template == theirs.template and ours.template is not None and ours.template.end == "<|endoftext|>"
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    ids = [ours.tokenizer.encode("Hello there, 東京")]
    assert torch.equal(ours.logits(ids), theirs.logits(ids))
    checkpoint.Checkpoint(moved).verify()
    state = checkpoint.Checkpoint(moved).state()
    assert (state["kind"], state["source"]) == ("language", str(hf_dir))


def test_an_imported_model_chats(
    run: Run, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import", hf_dir, tmp_path / "made")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    code, out, err = run("chat", tmp_path / "made", "--max_new_tokens", "3", "--seed", "1")
    assert (code, err) == (0, "") and out.endswith("\n")


def test_import_of_our_own_leaves_the_optimiser_behind(run: Run, good: Path, tmp_path: Path) -> None:
    tensors = {"model": checkpoint.load_tensors(good / "model.safetensors"), "optimizer": {"m": torch.ones(9)}}
    texts = {name: (good / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    run_dir = tmp_path / "run" / "sft" / "checkpoints" / "step-000009"
    checkpoint.save_checkpoint(run_dir, tensors=tensors, state=checkpoint.Checkpoint(good).state(), texts=texts)
    assert run("import", tmp_path / "run" / "sft", tmp_path / "made")[0] == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "chat_template.jinja", "model.safetensors", "state.json", "tokenizer.json"
    ]  # fmt: skip


def test_ends_that_cannot_be_guessed_are_kept(
    taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    """Which tokens end a text and a turn comes from the source, not from a guess at what was written."""
    model, tokenizer = taught
    unusual = Tokenizer(tokenizer.backend, end_of_text="<|reserved_0|>")
    template = ChatTemplate(NATIVE.source.replace("'<|end|>'", "'<|image|><|end|>'"), "<|end|>")
    parts = load_parts(save(tmp_path / "source", model, tokenizer))
    tools.write_model(
        type(parts)(parts.model, unusual, template, "x"), tmp_path / "made", source="x"
    )
    again = load(tmp_path / "made")
    assert again.tokenizer.end_of_text == "<|reserved_0|>"
    assert again.template == template != ChatTemplate.from_source(template.source)


def test_a_base_model_is_imported_as_one(run: Run, base_dir: Path, tmp_path: Path) -> None:
    code, out, _ = run("import", base_dir, tmp_path / "made")
    assert code == 0 and "a base model" in out and "chatwright generate" in out
    assert load(tmp_path / "made").template is None


def test_nothing_is_overwritten_unasked(run: Run, good: Path, base_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert run("import", good, target)[0] == 0
    before = (target / "state.json").read_bytes()
    code, _, err = run("import", base_dir, target)
    assert code == 1 and "--force" in err and (target / "state.json").read_bytes() == before
    assert run("import", base_dir, target, "--force")[0] == 0
    assert load(target).template is None
    (target / "thesis.txt").write_text("years of work")
    code, _, err = run("import", good, target, "--force")
    assert code == 1 and "thesis.txt" in err and (target / "thesis.txt").read_text() == "years of work"


def test_targets_that_cannot_be(run: Run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = run("import", good, tmp_path / "file")
    assert code == 1 and "is a file" in err
    code, _, err = run("import", good, good, "--force")
    assert code == 1 and "same place" in err
    checkpoint.Checkpoint(good).verify()
    (tmp_path / "empty").mkdir()
    assert run("import", good, tmp_path / "empty")[0] == 0


@pytest.mark.parametrize("what", ["tokens of a text", "tokens of a conversation", "logits"])
def test_what_reads_back_otherwise_is_not_kept(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    behaviour, calls = tools.behaviour, []

    def spoilt(parts: Any) -> Any:
        text, talk, logits = behaviour(parts)
        calls.append(1)
        if len(calls) == 2:
            text = [*text, 1] if what == "tokens of a text" else text
            talk = [*talk, 1] if what == "tokens of a conversation" else talk
            logits = logits.nextafter(logits + 1) if what == "logits" else logits
        return text, talk, logits

    monkeypatch.setattr(tools, "behaviour", spoilt)
    code, _, err = run("import", good, tmp_path / "deep" / "made")
    assert code == 1 and f"gives other {what} than its source" in err
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_source_without_a_tokenizer(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    code, _, err = run("import", tmp_path / "bare", tmp_path / "made")
    assert code == 1 and "has no tokenizer" in err and not (tmp_path / "made").exists()


# doctor: models


def findings(out: str) -> dict[str, str]:
    """Topic -> level, the worst of each."""
    levels: dict[str, str] = {}
    order = ["ok", "warning", "problem"]
    for line in out.splitlines():
        level, _, rest = line.partition(" ")
        if level in order and rest.strip():
            topic = rest.strip().split("  ")[0]
            levels[topic] = max(levels.get(topic, "ok"), level, key=order.index)
    return levels


def check(run: Run, *arguments: object, problem: str) -> str:
    """The doctor finds just this problem and says what to do; the output."""
    code, out, err = run("doctor", *arguments)
    assert (code, err) == (1, ""), out
    assert findings(out)[problem] == "problem", out
    assert out.splitlines()[-1].split(": ")[1].startswith("1 problem"), out
    lines = out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("problem"))
    assert lines[at + 1].strip().startswith("-> "), "a problem without a remedy"
    return out


def test_a_good_model(run: Run, good: Path) -> None:
    code, out, err = run("doctor", good)
    assert (code, err) == (0, ""), out
    found = findings(out)
    assert set(found) == {"files", "model", "precision", "memory", "tokenizer", "round trip", "controls", "context",
                          "generation", "template", "loss mask", "prompt", "elsewhere", "stopping"}  # fmt: skip
    assert set(found.values()) <= {"ok", "warning"}
    assert "0 problems" in out
    assert NATIVE.fingerprint in out and load(good).tokenizer.fingerprint in out
    assert "[[It is 4.<|end|>]]\n" in out and "[[Sure: the letters e, n, d.<|end|>]]\n" in out
    assert "<|user|>Hi! What is 2 + 2?<|end|><|assistant|>[[" in out


def test_a_model_that_has_learnt_to_stop(good: Path) -> None:
    """The taught model ends its own dialogues; an untrained one ends nothing."""
    model = load(good)
    assert model.template is not None
    known = [Message(role="user", content="hello"), Message(role="assistant", content="Hello there, friend!")]
    encoded = model.template.encode(known, model.tokenizer)
    assert doctor_model._stops(model.model, encoded, model.template, model.tokenizer).level == "ok"
    torch.manual_seed(0)
    fresh = GPT(GPTConfig.preset("modern-nano", vocab_size=model.tokenizer.vocab_size, context=256)).eval()
    assert doctor_model._stops(fresh, encoded, model.template, model.tokenizer).level == "warning"


def test_a_base_model(run: Run, base_dir: Path) -> None:
    code, out, _ = run("doctor", base_dir)
    assert code == 0 and "none: a base model" in out and "[[" not in out


def test_a_hugging_face_directory(run: Run, hf_dir: Path) -> None:
    code, out, _ = run("doctor", hf_dir)
    assert code == 0 and "128 positions in the table" in out and "<|endoftext|>]]" in out


def test_a_damaged_file(run: Run, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    code, out, _ = run("doctor", copy)
    assert code == 1 and findings(out)["files"] == "problem" and "tokenizer.json is damaged" in out


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: Run, good: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(good, tmp_path / "sft" / "checkpoints" / f"step-{step:06}")
    (tmp_path / "sft" / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"x")
    code, out, _ = run("doctor", tmp_path / "sft")
    assert code == 0 and "step-000002" in out and findings(out)["files"] == "warning"


def test_a_reward_model(run: Run, copy: Path) -> None:
    state = checkpoint.read_json(copy / "state.json")
    state["files"].pop("state.json")  # its own checksum: this one is edited on purpose
    checkpoint.write_json(copy / "state.json", {**state, "kind": "reward"})
    assert "kind 'reward'" in check(run, copy, problem="model")


def test_weights_that_diverged(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = taught
    broken = GPT(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.blocks[0].mlp.down.weight[0, 0] = torch.nan  # type: ignore[union-attr,index]
    code, out, _ = run("doctor", save(tmp_path / "nan", broken, tokenizer))
    assert code == 1 and findings(out)["weights"] == "problem"
    assert "blocks.0.mlp.down.weight" in out and "lower the learning rate" in out


def test_a_tokenizer_that_was_exchanged(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = taught
    directory = save(tmp_path / "x", model, tokenizer, mark="0123456789abcdef")
    assert "trained with 0123456789abcdef" in check(run, directory, problem="tokenizer")


def test_a_template_whose_end_is_not_learnt(
    run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    """The template ends each turn at the beginning of the next one: no answer's end is seen in its own turn."""
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|end|>"
    out = check(run, save(tmp_path / "x", *taught, source), problem="loss mask")
    assert "1 of 2 answers" in out and "never stop" in out


def test_a_template_whose_end_is_unknown(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    source = NATIVE.source.replace("<|end|>", "<|eot|>")
    assert "<|eot|>, which is no control token" in check(run, save(tmp_path / "x", *taught, source), problem="template")


def test_templates_that_deserve_a_warning(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + NATIVE.source
    code, out, _ = run("doctor", save(tmp_path / "a", *taught, no_system))
    assert code == 0 and findings(out)["system"] == "warning"
    other_prompt = NATIVE.source.replace("{{ '<|assistant|>' }}", "{{ '<|tool|>' }}")
    code, out, _ = run("doctor", save(tmp_path / "b", *taught, other_prompt))
    assert code == 0 and findings(out)["prompt"] == "warning"


def test_templates_that_others_read_otherwise(taught: tuple[GPT, Tokenizer]) -> None:
    """Where the template's text and a content make one word, tokenizing the whole gives other tokens."""
    tokenizer = taught[1]
    spelled = [tokenizer.token_bytes(number).decode("ascii", errors="replace") for number in range(tokenizer.vocab_size)]
    word = max((text for text in spelled if text.isalpha()), key=len)  # one token; it is cut behind its first letter
    talk = [Message(role="user", content=word[1:]), Message(role="assistant", content="x")]
    joined = ChatTemplate(NATIVE.source.replace("+ '|>' +", f"+ '|>{word[0]}' +"), "<|end|>")
    assert doctor_model._twin(talk, joined, tokenizer).level == "warning"
    assert doctor_model._twin(talk, NATIVE, tokenizer).level == "ok"


def test_a_position_table_of_another_length(taught: tuple[GPT, Tokenizer]) -> None:
    _, tokenizer = taught
    model = GPT(GPTConfig.preset("gpt2", vocab_size=tokenizer.vocab_size, context=64, layers=1, width=16, heads=2))
    assert doctor_model._context(model.eval()).level == "ok"
    model.positions = torch.nn.Embedding(32, 16)
    finding = doctor_model._context(model)
    assert finding.level == "problem" and "32 positions" in finding.text


def test_more_memory_than_there_is(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatwright.runtime.total_memory_bytes", lambda: 500_000)
    check(run, good, problem="memory")
    need = 16 * load(good).model.parameter_count()
    monkeypatch.setattr("chatwright.runtime.total_memory_bytes", lambda: need)
    code, out, _ = run("doctor", good)
    assert code == 0 and findings(out)["memory"] == "warning"


def dialogue_file(path: Path, *dialogues: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in one]}) for one in dialogues]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_own_dialogues(run: Run, good: Path, tmp_path: Path) -> None:
    talk = [("user", "hi <|end|>"), ("assistant", "yes ☃"), ("user", "bye")]
    file = dialogue_file(tmp_path / "d.jsonl", talk)
    code, out, _ = run("doctor", good, "--dialogue", file)
    assert code == 0 and findings(out)["dialogues"] == "ok" and "1 conversations" in out
    assert "<|user|>hi <|end|><|end|><|assistant|>[[yes ☃<|end|>]]\n<|user|>bye<|end|>" in out
    file = dialogue_file(tmp_path / "long.jsonl", talk, [("user", "x"), ("assistant", "y z " * 300)], [("user", "q")])
    code, out, _ = run("doctor", good, "--dialogue", file)
    assert code == 0 and findings(out)["dialogues"] == "warning"
    assert "1 are longer than the context of 256, 1 have no answer" in out
    file = dialogue_file(tmp_path / "silent.jsonl", [("user", "x")])
    assert run("doctor", good, "--dialogue", file)[0] == 1


def test_own_dialogues_that_are_broken(run: Run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    code, out, _ = run("doctor", good, "--dialogue", tmp_path / "d.jsonl")
    assert code == 1 and "d.jsonl" in out and "robot" in out
    code, out, _ = run("doctor", good, "--dialogue", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl" in out


def test_the_picture_has_colours_on_a_terminal(small_tokenizer: Tokenizer) -> None:
    talk = [Message(role="user", content="a\x1b[31m"), Message(role="assistant", content="b")]
    picture = mask_picture(NATIVE.encode(talk, small_tokenizer), small_tokenizer, end="<|end|>", colours=True)
    assert picture.plain == "<|user|>a␛[31m<|end|><|assistant|>b<|end|>"
    learnt = [picture.plain[span.start : span.end] for span in picture.spans if "green" in str(span.style)]
    assert learnt == ["b<|end|>"]
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=100).print(picture)
    assert "\x1b[30;42mb<|end|>\x1b[0m" in out.getvalue() and "[[" not in out.getvalue()


def test_it_changes_nothing(run: Run, good: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in good.iterdir()}
    state = torch.get_rng_state()
    run("doctor", good)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in good.iterdir()} == before
    assert torch.equal(torch.get_rng_state(), state)


# doctor: recipes


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A recipe with these stages, in an empty folder with an empty cache."""
    monkeypatch.setenv("CHATWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(stages: str) -> Path:
        (tmp_path / "r.yaml").write_text(f"stages: {stages}\n")
        return tmp_path / "r.yaml"

    return write


def test_the_built_in_recipe(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = run("doctor", "tiny")
    assert (code, err) == (0, "") and "0 problems" in out
    assert "data -> tokenizer -> pretrain -> sft -> reward -> ppo -> eval" in out
    assert "chitchat will be downloaded" in out
    assert list(tmp_path.iterdir()) == [], "it only looks"


@pytest.mark.parametrize(
    ("stages", "topic", "said"),
    [
        ("{pretrian: {}}", "recipe", "did you mean 'pretrain'?"),
        ("{sft: {base: nowhere, data: .}}", "sft", "its input 'nowhere' is neither a stage"),
        ("{data: {text: boolqq}}", "data.text", "did you mean 'boolq'?"),
        ("{data: {dialogues: boolq}}", "data.dialogues", "boolq holds text records, not dialogue"),
        ("{data: {path: empty}}", "data.text", "empty"),
        ("{data: {dialogues: ''}, sft: {base: smollm2}}", "data", "`dialogues` is empty, but sft"),
        ("{data: {ratings: ''}, reward: {base: smollm2}}", "data", "`ratings` is empty, but reward"),
        ("{pretrain: {tokenizer: ., fit: {batch_size: 8, micro_batch: 3}}}", "pretrain", "multiple of micro_batch"),
        ("{pretrain: {tokenizer: ., fit: {seconds: 0}}}", "pretrain", "give steps or seconds"),
        ("{pretrain: {tokenizer: ., preset: modern-tyny}}", "pretrain", "did you mean modern-tiny?"),
        ("{pretrain: {tokenizer: ., model: {layerz: 3}}}", "pretrain", "layerz"),
        ("{data: {}, tokenizer: {vocab_size: 100}}", "tokenizer", "vocab_size 100 is too small"),
        ("{pretrain: {tokenizer: ., model: {context: 64}}, ppo: {base: pretrain, reward: ., data: .}}", "ppo",
         "do not fit into the model's context of 64"),
    ],
)  # fmt: skip
def test_recipes_with_a_problem(
    run: Run, recipe: Callable[[str], Path], tmp_path: Path, stages: str, topic: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert said in check(run, recipe(stages), problem=topic)


def test_own_text_is_looked_at(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Some text.")
    code, out, _ = run("doctor", recipe("{data: {path: mine.txt, dialogues: '', ratings: ''}}"))
    assert code == 0 and "mine.txt: its first record can be read" in out
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9 " * 9)
    assert "mine.txt" in check(run, tmp_path / "r.yaml", problem="data.text")


def test_a_source_in_the_cache(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    from chatwright.data.archives import CHITCHAT

    (tmp_path / "cache" / "archives").mkdir(parents=True)
    (tmp_path / "cache" / "archives" / CHITCHAT.filename).write_bytes(b"")
    out = run("doctor", recipe("{data: {text: 'chitchat,shakespeare', ratings: ''}}"))[1]
    assert "chitchat is in the cache" in out and "shakespeare will be downloaded" in out


def test_recipes_that_are_too_large(
    run: Run, recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("{pretrain: {tokenizer: ., preset: gpt2}}")
    monkeypatch.setattr("chatwright.runtime.total_memory_bytes", lambda: 3e9)
    assert "set pretrain.fit.micro_batch" in check(run, path, problem="memory")
    monkeypatch.setattr("chatwright.runtime.total_memory_bytes", lambda: None)
    full = shutil.disk_usage(path.parent)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    check(run, path, problem="disk")


def test_a_vocabulary_that_eats_the_model(run: Run, recipe: Callable[[str], Path]) -> None:
    code, out, _ = run("doctor", recipe("{data: {}, tokenizer: {vocab_size: 40000}, pretrain: {}}"))
    assert code == 0 and findings(out)["pretrain"] == "warning" and "% of the parameters are the token table" in out


def test_names_that_lead_nowhere(run: Run, recipe: Callable[[str], Path]) -> None:
    for name in ("nowhere", "no/such/model"):
        code, _, err = run("doctor", name)
        assert code == 1 and "is no recipe" in err and "no model" in err
    assert run("doctor", "nowhere.yaml")[0] == 2


def test_the_estimate_of_parameters_is_the_count() -> None:
    from chatwright.serve.doctor_recipe import parameters

    assert parameters(GPTConfig.preset("gpt2")) == 124_439_808


def test_check_target_needs_no_torch(tmp_path: Path) -> None:
    tools.check_target(tmp_path / "new", force=False)
    with pytest.raises(UserError, match="is a file"):
        tools.check_target(Path(__file__), force=True)
