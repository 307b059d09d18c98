"""What the tests of `import` and `doctor` share: the program run in this process, and models in
directories."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatwright import checkpoint, cli, metrics
from chatwright.chat import NATIVE
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        out = io.StringIO()
        # The one console, changed, and not another in its place: a module that is first imported now would
        # keep that one.
        monkeypatch.setattr(metrics.console, "_file", out)
        monkeypatch.setattr(metrics.console, "_width", 200)
        monkeypatch.setattr(metrics.console, "_force_terminal", False)
        code = cli.main([str(argument) for argument in arguments])
        printed, err = capsys.readouterr()
        return code, out.getvalue() + printed, err

    return call


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, taught: tuple[GPT, Tokenizer]) -> Path:
    """A model that has learnt its dialogues, as a model directory."""
    return save(tmp_path_factory.mktemp("good") / "model", *taught)


def save(
    target: Path, model: GPT, tokenizer: Tokenizer, source: str | None = NATIVE.source, mark: str = ""
) -> Path:
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": mark or tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json()}
    if source is not None:
        texts["chat_template.jinja"] = source
    checkpoint.save_checkpoint(
        target, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts
    )
    return target


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """The good model, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 as transformers saves it, with a tokenizer and a chat template that ends turns with its
    eos."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.train(["Hello there! Are you there?"] * 4, 300)
    tokenizer.save(directory)
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    ).save_pretrained(directory)
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token="<|endoftext|>", chat_template=template
    ).save_pretrained(directory)
    return directory


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
