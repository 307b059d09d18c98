"""The public surface: what `import chatwright as cw` promises."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch

import chatwright as cw

ROOT = Path(__file__).parent.parent


def test_all_names_are_there() -> None:
    assert sorted(cw.__all__) == sorted({*cw._HOME, "__version__"})
    assert dir(cw) == sorted(cw.__all__)
    for name in cw.__all__:
        assert name == "__version__" or getattr(cw, name).__name__ == name
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", cw.__version__)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'chatwright' has no attribute 'lode'"):
        cw.lode  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (resources.files("chatwright") / "py.typed").is_file()


def test_a_model_through_the_public_names_alone(chat_dir: Path) -> None:
    model = cw.load(str(chat_dir))
    assert isinstance(model, cw.LanguageModel) and isinstance(model.model, cw.GPT)
    assert isinstance(model.tokenizer, cw.Tokenizer) and isinstance(model.template, cw.ChatTemplate)
    assert isinstance(model.model.config, cw.GPTConfig)
    ids = model.tokenizer.encode("text")
    assert ids and all(isinstance(number, int) for number in ids) and model.tokenizer.decode(ids) == "text"
    logits = model.logits([[1, 2, 3]])
    assert logits.shape == (1, 3, model.tokenizer.vocab_size) and logits.dtype == torch.float32
    likeliest = int(model.logits([model.tokenizer.encode("Once")])[0, -1].argmax())
    assert model.generate("Once", max_new_tokens=1, temperature=0.0) == model.tokenizer.decode([likeliest])
    one, other = (model.chat([{"role": "user", "content": "hi"}], seed=seed) for seed in (1, 2))
    assert one != other  # an untrained model samples anything
    with pytest.raises(cw.UserError):
        cw.load("no/such/model")


def test_the_example_in_the_readme_runs(chat_dir: Path) -> None:
    """As it stands there, on a model and with a shape that are small."""
    examples = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    examples = [example for example in examples if "cw.load(" in example]
    assert examples, "README.md has no Python example that loads a model"
    for example in examples:
        example = re.sub(r"cw\.load\([^)]*\)", f"cw.load({str(chat_dir)!r})", example)
        exec(re.sub(r'preset\("[^"]*"\)', 'preset("modern-nano")', example), {})
