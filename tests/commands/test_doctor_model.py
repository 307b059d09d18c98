"""The verb `doctor` on models: each finding is made to appear by a fault that was planted."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from chatwright import files
from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.commands.doctor import chat as doctor_chat
from chatwright.commands.doctor import model as doctor
from chatwright.commands.doctor import text as doctor_text
from chatwright.data.picture import mask_picture
from chatwright.language_model import load
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.text_frame import TextFrame
from chatwright.tokenizer import Tokenizer
from support.tooling import Run, check, findings, save


def test_a_good_model(run: Run, good: Path) -> None:
    code, out, err = run("doctor", good)
    assert (code, err) == (0, ""), out
    found = findings(out)
    assert set(found) == {
        "files",
        "model",
        "precision",
        "dtype fp32",
        "dtype bf16",
        "dtype int8",
        "dtype int4",
        "serving",
        "training",
        "tokenizer",
        "round trip",
        "controls",
        "text",
        "ends",
        "sampling",
        "context",
        "generation",
        "template",
        "loss mask",
        "prompt",
        "elsewhere",
        "stopping",
        "export hf",
        "export gguf",
    }
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
    assert doctor_chat._stops(model.model, encoded, model.template, model.tokenizer).level == "ok"
    torch.manual_seed(0)
    fresh = GPT(GPTConfig.preset("modern-nano", vocab_size=model.tokenizer.vocab_size, context=256)).eval()
    assert doctor_chat._stops(fresh, encoded, model.template, model.tokenizer).level == "warning"


def test_what_the_doctor_says_of_texts(run: Run, good: Path) -> None:
    """What stands in front of one, what ends an answer, how tokens are chosen, and who says so."""
    out = " ".join(run("doctor", good)[1].split())
    assert "in front of a text stands <|endoftext|> (0) (documents are divided by it in training)" in out
    assert "an answer ends at <|endoftext|> (0): the end of text; <|end|> (5): the chat template" in out
    assert "where nobody says otherwise: temperature 0.7" in out


def test_a_plain_text_side_by_side_with_transformers(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    hf_dir = shutil.copytree(hf_dir, tmp_path / "hf")
    settings = json.loads((hf_dir / "tokenizer_config.json").read_text())
    content = json.loads((hf_dir / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": known,
    }
    (hf_dir / "tokenizer.json").write_text(json.dumps(content))
    settings |= {"add_bos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (hf_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    (hf_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 99_999]}))
    code, out, _ = run("doctor", hf_dir)
    out = " ".join(out.split())
    assert code == 0
    assert "<|endoftext|> (0) (the post_processor of tokenizer.json)" in out
    assert "eos_token of tokenizer_config.json, eos_token_id" not in out  # each end once, first come
    assert "not 99999, 50256, for no token has that number" in out  # transformers' own for GPT-2
    assert "<|endoftext|> T" in out and ", as in transformers" in out
    tokenizer = load(hf_dir).tokenizer.framed(TextFrame())
    found = doctor_text._beside(tokenizer, str(hf_dir))
    assert found is not None and found.level == "warning"
    assert (
        "here and <|endoftext|> T" in found.text
        and "transformers 5 leaves add_bos_token aside" in found.remedy
    )


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


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    run: Run, good: Path, tmp_path: Path
) -> None:
    for step in (1, 2):
        shutil.copytree(good, tmp_path / "sft" / "checkpoints" / f"step-{step:06}")
    (tmp_path / "sft" / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"x")
    code, out, _ = run("doctor", tmp_path / "sft")
    assert code == 0 and "step-000002" in out and findings(out)["files"] == "warning"


def test_a_reward_model(run: Run, copy: Path) -> None:
    state = files.read_json(copy / "state.json")
    state["files"].pop("state.json")  # its own checksum: this one is edited on purpose
    files.write_json(copy / "state.json", {**state, "kind": "reward"})
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


def test_a_template_whose_end_is_not_learnt(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    """The template ends each turn at the beginning of the next one: no answer's end is seen in its own
    turn."""
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|end|>"
    out = check(run, save(tmp_path / "x", *taught, source), problem="loss mask")
    assert "1 of 2 answers" in out and "never stop" in out


def test_a_template_whose_end_is_unknown(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    source = NATIVE.source.replace("<|end|>", "<|eot|>")
    assert "<|eot|>, which is no control token" in check(
        run, save(tmp_path / "x", *taught, source), problem="template"
    )


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
    spelled = [
        tokenizer.token_bytes(number).decode("ascii", errors="replace")
        for number in range(tokenizer.vocab_size)
    ]
    word = max(
        (text for text in spelled if text.isalpha()), key=len
    )  # one token; it is cut behind its first letter
    talk = [Message(role="user", content=word[1:]), Message(role="assistant", content="x")]
    joined = ChatTemplate(NATIVE.source.replace("+ '|>' +", f"+ '|>{word[0]}' +"), "<|end|>")
    assert doctor_chat._twin(talk, joined, tokenizer).level == "ok"  # joined here as there
    assert doctor_chat._twin(talk, NATIVE, tokenizer).level == "ok"


def test_a_position_table_of_another_length(taught: tuple[GPT, Tokenizer]) -> None:
    _, tokenizer = taught
    model = GPT(
        GPTConfig.preset("gpt2", vocab_size=tokenizer.vocab_size, context=64, layers=1, width=16, heads=2)
    )
    assert doctor._context(model.eval()).level == "ok"
    model.positions = torch.nn.Embedding(32, 16)
    finding = doctor._context(model)
    assert finding.level == "problem" and "32 positions" in finding.text


def gpt2(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig.preset("gpt2", vocab_size=tokenizer.vocab_size, context=64, layers=1, width=16, heads=2)
    ).eval()


def test_a_context_that_is_not_the_length_of_the_table(
    run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    """Such a model cannot be loaded; the doctor says why, in our directories and in transformers' ones."""
    directory = save(tmp_path / "ours", gpt2(taught[1]), taught[1])
    state = files.read_json(directory / "state.json")
    state["files"].pop("state.json")
    state["model"]["context"] = 128
    files.write_json(directory / "state.json", state)
    assert "128 tokens, but 64 positions in the table" in check(run, directory, problem="context")
    run("export", save(tmp_path / "good", gpt2(taught[1]), taught[1]), tmp_path / "theirs", "--format", "hf")
    config = files.read_json(tmp_path / "theirs" / "config.json")
    files.write_json(tmp_path / "theirs" / "config.json", {**config, "n_positions": 32})
    out = check(run, tmp_path / "theirs", problem="context")
    assert "32 tokens, but 64 positions" in out and "set the context to 64 in config.json" in out


def test_a_last_position_that_is_damaged(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    """Every number is finite, and what is computed from them is not."""
    model = gpt2(taught[1])
    assert model.positions is not None
    with torch.no_grad():
        model.positions.weight[-1] = 3e38
    assert "position 63 are not finite" in check(
        run, save(tmp_path / "x", model, taught[1]), problem="context"
    )


def test_a_cache_that_changes_the_answer(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatwright.generate.torch_runner import TorchRunner

    forward = TorchRunner.forward

    def spoilt(self: TorchRunner, feeds: Any) -> Any:
        logits = forward(self, feeds)
        return logits + 0.1 * torch.linspace(0, 1, logits.shape[-1]) if feeds[0].start else logits

    monkeypatch.setattr(TorchRunner, "forward", spoilt)
    assert "with and without the cache" in check(run, good, problem="generation")


def test_a_tokenizer_that_changes_text(run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    content = {**json.loads(taught[1].to_json()), "normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    code, out, _ = run("doctor", save(tmp_path / "x", taught[0], Tokenizer.load(tmp_path)))
    found = findings(out)
    assert code == 0 and found["round trip"] == "warning" and found["export gguf"] == "warning"
    assert "normalises text first" in out


def test_a_tokenizer_that_makes_control_tokens_of_text(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode

    def spoilt(self: Tokenizer, text: str | bytes, *, continues: bool = False) -> list[int]:
        spelled = "".join(self.controls)
        return list(self.control_ids.values()) if text == spelled else encode(self, text, continues=continues)

    monkeypatch.setattr(Tokenizer, "encode", spoilt)
    assert "users could fake turns" in check(run, good, problem="controls")


def test_weights_without_a_tokenizer(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "none beside the weights" in check(run, tmp_path / "bare", problem="tokenizer")


def test_a_context_too_short_for_conversations(
    run: Run, taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("modern-nano", vocab_size=taught[1].vocab_size, context=32))
    code, out, _ = run("doctor", save(tmp_path / "x", model, taught[1]))
    assert code == 0 and findings(out)["stopping"] == "warning" and "need a longer context" in out


def dialogue_file(path: Path, *dialogues: list[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in one]}) for one in dialogues
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_own_dialogues(run: Run, good: Path, tmp_path: Path) -> None:
    talk = [("user", "hi <|end|>"), ("assistant", "yes ☃"), ("user", "bye")]
    file = dialogue_file(tmp_path / "d.jsonl", talk)
    code, out, _ = run("doctor", good, "--dialogue", file)
    assert code == 0 and findings(out)["dialogues"] == "ok" and "1 conversations" in out
    assert "<|user|>hi <|end|><|end|><|assistant|>[[yes ☃<|end|>]]\n<|user|>bye<|end|>" in out
    file = dialogue_file(
        tmp_path / "long.jsonl", talk, [("user", "x"), ("assistant", "y z " * 300)], [("user", "q")]
    )
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
