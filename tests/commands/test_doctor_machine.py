"""The verb `doctor` on models: what it says about this machine and about exports, each by a fault that was
planted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright.commands.doctor import export, machine
from chatwright.generate.kernels import paths
from chatwright.interop.loaded import Stored
from chatwright.language_model import LanguageModel, load
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.serve.footprint import serving
from chatwright.tokenizer import Tokenizer
from support.tooling import Run, check, findings, save

NAMED = ("fp32", "bf16", "int8", "int4")


@pytest.fixture
def shaped(taught: tuple[GPT, Tokenizer], tmp_path: Path) -> Callable[..., Path]:
    """An untrained model of a shape, as a model directory."""

    def make(preset: str, **changes: Any) -> Path:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset(preset, vocab_size=taught[1].vocab_size, **changes))
        return save(tmp_path / "shaped", model, taught[1])

    return make


@pytest.fixture
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files: nothing may be left in it."""
    folder = tmp_path / "aside"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_which_instructions_compute(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATWRIGHT_KERNELS", raising=False)
    monkeypatch.setattr(paths, "possible", lambda: ["plain", "avx2", "vnni"])
    out = run("doctor", good)[1]
    assert all(findings(out)[f"dtype {name}"] == "ok" for name in NAMED)
    assert out.count("AVX-512 VNNI, of plain, avx2, vnni on this processor") == 2
    monkeypatch.setenv("CHATWRIGHT_KERNELS", "plain")
    code, out, _ = run("doctor", good)
    assert code == 0 and "unset CHATWRIGHT_KERNELS: there is vnni" in out
    assert [findings(out)[f"dtype {name}"] for name in NAMED] == ["ok", "ok", "warning", "warning"]
    monkeypatch.setattr(paths, "possible", lambda: ["plain"])
    assert "--dtype bf16 is likely faster here" in run("doctor", good)[1]
    monkeypatch.setenv("CHATWRIGHT_KERNELS", "neon")
    code, out, _ = run("doctor", good)
    assert (
        code == 1 and "4 problems" in out and "CHATWRIGHT_KERNELS=neon: this processor can run plain" in out
    )
    assert all(findings(out)[f"dtype {name}"] == "problem" for name in NAMED)


def test_a_shape_that_the_kernels_lack(run: Run, shaped: Callable[..., Path]) -> None:
    code, out, err = run("doctor", shaped("gpt1", layers=1, width=16, heads=2, context=128))
    assert (code, err) == (0, ""), out
    assert all(findings(out)[f"dtype {name}"] == "warning" for name in NAMED)
    assert (
        out.count("the CPU kernels cannot run a model with post-norm blocks") == 4
        and "leave --dtype at auto" in out
    )
    found = findings(out)
    assert (found["export hf"], found["export gguf"]) == ("ok", "warning")
    assert "post-norm (GPT-1), which no architecture of llama.cpp computes" in out


def test_dtypes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatwright.runtime.device", lambda: torch.device("cuda"))
    config = GPTConfig.preset("gpt1")
    for real in (True, False):
        monkeypatch.setattr("chatwright.runtime.has_bf16", lambda real=real: real)
        found = {one.topic: one for one in machine._dtypes(config)}
        assert [found[f"dtype {name}"].level for name in NAMED] == [
            "ok",
            "ok" if real else "warning",
            "warning",
            "warning",
        ]
        assert "CHATWRIGHT_DEVICE=cpu" in found["dtype int4"].remedy
    monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda: 10**12)
    assert "int8" not in machine._serving(config, 10**8).text


@pytest.mark.parametrize("real", [True, False])
def test_the_precision_of_training(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    monkeypatch.setattr("chatwright.runtime.has_bf16", lambda: real)
    said = (
        "cpu computes bf16: training uses it"
        if real
        else "cpu has no bf16 units: training computes in float32"
    )
    assert said in run("doctor", good)[1]


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", *NAMED])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("modern-nano", {"context": 100}),
        (
            "modern-nano",
            {"context": 4096, "tied": False, "width": 40, "mlp_width": 90, "head_dim": 10, "qk_norm": False},
        ),
        ("gpt2", {"layers": 2, "width": 48, "heads": 3, "context": 40_000}),
    ],
)
def test_the_estimate_is_what_serving_takes(
    small_tokenizer: Tokenizer, dtype: str, preset: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, vocab_size=small_tokenizer.vocab_size, **changes))
    made = LanguageModel(model, small_tokenizer, None, "x", dtype=dtype)
    plan = serving(
        model.config, model.parameter_count(), "fp32" if dtype == "auto" else dtype, kernels=dtype != "auto"
    )
    packed = made.engine.runner.weight_bytes()
    assert plan.cache == made.engine.cache_bytes
    assert plan.weights == made.memory_bytes - packed - made.engine.cache_bytes
    vectors = 4 * sum(one.numel() + 15 for one in model.parameters() if one.dim() == 1) + 500
    assert 0 <= packed - plan.packed <= vectors


def test_more_memory_than_there_is(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(good).model
    count = model.parameter_count()
    plans = {name: serving(model.config, count, name) for name in NAMED}
    monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda: plans["int4"].total - 1)
    assert "use a machine with more memory" in check(run, good, problem="serving")
    monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda: plans["int8"].total)
    code, out, _ = run("doctor", good)
    assert code == 0 and findings(out)["serving"] == "warning"
    assert "serve it with --dtype int4; these fit: int8, int4" in out
    monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda: plans["fp32"].total + 10**6)
    assert findings(run("doctor", good)[1])["serving"] == "ok"
    monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda: None)
    assert run("doctor", good)[1].count("this system does not say") == 2


def test_too_little_memory_for_training(
    run: Run, shaped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and two moments are 16 bytes a parameter, of nine tenths of what there is."""
    directory = shaped("modern-nano", context=16)  # little for keys and values: it can be served in less
    need = 16 * load(directory).model.parameter_count()
    for have, level in ((need / 0.9 - 100, "warning"), (need / 0.9 + 100, "ok")):
        monkeypatch.setattr("chatwright.memory.total_memory_bytes", lambda have=have: have)
        code, out, _ = run("doctor", directory)
        found = findings(out)
        assert (code, found["training"], found["serving"]) == (0, level, "ok"), out


# ---- exports -----------------------------------------------------------------------------------------------


def test_exports_are_tried_and_thrown_away(run: Run, good: Path, aside: Path) -> None:
    import transformers

    code, out, err = run("doctor", good)
    assert (code, err) == (0, "")
    assert (
        f"transformers' qwen3: read back by chatwright (equal) and transformers {transformers.__version__}"
        in out
    )
    assert "the same ids of a text and of a conversation, logits at most" in out
    assert "llama.cpp's qwen3: read back by chatwright: the same ids and the same logits" in out
    assert list(aside.iterdir()) == []


def test_without_transformers(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    code, out, _ = run("doctor", good)
    assert code == 0 and findings(out)["export hf"] == "ok" and "transformers is not installed" in out


def test_a_shape_that_no_format_has(run: Run, shaped: Callable[..., Path]) -> None:
    code, out, _ = run("doctor", shaped("modern-nano", context=128, logit_softcap=5.0))
    found = findings(out)
    assert code == 0 and found["export hf"] == found["export gguf"] == "warning"
    assert out.count("the model has logit_softcap 5.0") == 2 and "docs/guide/export.md" in out


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_weights_that_are_written_otherwise(
    run: Run, good: Path, aside: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    plan = getattr(export, f"plan_{form}")

    def spoilt(parts: Any) -> Any:
        made = plan(parts)
        name = next(name for name in made.tensors if "norm" in name)
        tensor = made.tensors[name]
        return replace(
            made, tensors={**made.tensors, name: Stored(tensor.shape, lambda: tensor.read() * 1.01)}
        )

    monkeypatch.setattr(export, f"plan_{form}", spoilt)
    out = check(run, good, problem=f"export {form}")
    assert "chatwright reads back other logits" in out and list(aside.iterdir()) == []


def test_a_template_that_is_written_otherwise(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = export.plan_hf

    def spoilt(parts: Any) -> Any:
        made = plan(parts)
        name = "chat_template.jinja"
        return replace(made, texts={**made.texts, name: "x" + made.texts[name]})

    monkeypatch.setattr(export, "plan_hf", spoilt)
    assert "chatwright reads back other ids of a conversation" in check(run, good, problem="export hf")


def test_transformers_that_computes_otherwise(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    load_theirs = AutoModelForCausalLM.from_pretrained

    def spoilt(*arguments: Any, **settings: Any) -> Any:
        model = load_theirs(*arguments, **settings)
        with torch.no_grad():
            model.model.norm.weight *= 1.001
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spoilt)
    assert "computes logits that are" in check(run, good, problem="export hf")


def test_transformers_that_refuses(
    run: Run, good: Path, aside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("no such\nmodel type")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert "refuses it: no such model type" in check(run, good, problem="export hf")
    assert list(aside.iterdir()) == []


@pytest.mark.parametrize("what", ["a text", "a conversation", "nothing"])
def test_transformers_that_tokenizes_otherwise(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from transformers import AutoTokenizer

    load_theirs = AutoTokenizer.from_pretrained

    def spoilt(*arguments: Any, **settings: Any) -> Any:
        tokenizer = load_theirs(*arguments, **settings)
        if what == "a text":
            monkeypatch.setattr(tokenizer, "encode", lambda text, **_: [1, 2, 3])
        elif what == "a conversation":
            tokenizer.chat_template = tokenizer.chat_template.replace(
                "message['content']", "message['content'] + '!'"
            )
            tokenizer.chat_template += "!"
        else:
            tokenizer.chat_template = "{{ raise_exception('not today') }}"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spoilt)
    said = "cannot use the template: not today" if what == "nothing" else f"gets other ids of {what}"
    assert said in check(run, good, problem="export hf")


def test_models_that_are_too_large_for_a_trial(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", 1_000)
    code, out, _ = run("doctor", good)
    found = findings(out)
    assert code == 0 and found["export hf"] == found["export gguf"] == "warning"
    assert f"`chatwright export {good} DIR --format hf` writes it" in out
    assert f"`chatwright export {good} FILE.gguf --format gguf` writes it" in out
    monkeypatch.undo()
    monkeypatch.setattr(
        "chatwright.memory.total_memory_bytes", lambda: 8 * load(good).model.parameter_count() - 1
    )
    assert "two copies take" in run("doctor", good)[1]


def test_a_disk_without_room(run: Run, good: Path, aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(aside)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, out, _ = run("doctor", good)
    assert code == 0 and findings(out)["export gguf"] == "warning" and f"are free in {aside} (TMPDIR" in out
    monkeypatch.undo()

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.HFExport, "write", write)
    out = check(run, good, problem="export hf")
    assert "No space left on device" in out and "--debug" in out
