"""On what an adapter belongs, and adapters that were trained over one another, written for PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chatwright as cw
from chatwright import checkpoint, files
from chatwright.chat import NATIVE
from chatwright.config import UserError
from chatwright.interop.adapter_origin import NOTE, Origin, origin_of, read_origin
from chatwright.interop.peft import load_peft
from chatwright.language_model import load_parts
from chatwright.model.gpt import GPT
from chatwright.model.lora import LoRAConfig, add_lora, lora_parameters, merged_tensors
from chatwright.tokenizer import Tokenizer
from chatwright.train.adapters import write_adapter
from support.small_stages import Run, command_line, one_line

from .conftest import SHAPES, random_model, their_model

IDS = torch.randint(280, (2, 19), generator=torch.Generator().manual_seed(1))
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@contextmanager
def old_names() -> Iterator[None]:
    """PEFT asks transformers for what has new names there."""
    import warnings

    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind)
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


@dataclass
class Road:
    """A base model, an SFT stage with an adapter over it, and a PPO stage with an adapter over that one."""

    base: Path
    sft: Path
    ppo: Path
    logits: torch.Tensor
    """Of the PPO stage's model."""


def save(directory: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A model directory of ours."""
    state = {"kind": "language", "model": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json(), "chat_template.jinja": NATIVE.source}
    tensors = {"model": merged_tensors(model)}
    checkpoint.save_checkpoint(directory, tensors=tensors, state=state, texts=texts)
    return directory


def stage(directory: Path, base: str, over: Path, config: LoRAConfig, seed: int, tokenizer: Tokenizer) -> GPT:
    """A finished stage that trained an adapter over the model `over`, whose setting is `base`."""
    model = load_parts(over).model
    add_lora(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    save(directory / "checkpoints" / "step-000001", model, tokenizer)
    write_adapter(model, directory, base=base)
    files.write_json(directory / "result.json", {"model": "checkpoints/step-000001"})
    return model.eval()


@pytest.fixture(params=["llama", "gpt2"])
def road(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Road:
    base = save(tmp_path / "base", random_model(SHAPES[request.param]), tokenizer)
    sft, ppo = tmp_path / "runs/my/sft", tmp_path / "runs/my/ppo"
    stage(
        sft, str(base), base, LoRAConfig(rank=3, alpha=7.0, targets=("query", "value", "down")), 3, tokenizer
    )
    config = LoRAConfig(rank=2, alpha=5.0, rank_stabilised=True)
    model = stage(ppo, "sft", sft, config, 4, tokenizer)
    with torch.no_grad():
        return Road(base, sft, ppo, model(IDS))


# ---- what it says ------------------------------------------------------------------------------------------


def test_an_adapter_over_an_adapter_says_so(road: Road) -> None:
    found = read_origin(road.ppo / "adapter")
    assert found == Origin(str(road.base), adapters=(str(road.sft / "adapter"),))
    settings = json.loads((road.ppo / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None  # any name would be another model
    told = (road.ppo / "adapter/README.md").read_text()
    assert "with another adapter in it (../../sft/adapter), and belongs on both" in told
    assert "--adapters merged" in told and "--adapters stacked" in told


def test_a_run_that_was_copied_finds_its_adapters(road: Road, tmp_path: Path) -> None:
    shutil.copytree(road.base, tmp_path / "away/base")
    shutil.copytree(road.sft.parent, tmp_path / "away/runs/my")
    found = read_origin(tmp_path / "away/runs/my/ppo/adapter")
    assert found is not None and found.adapters == (str(tmp_path / "away/runs/my/sft/adapter"),)
    assert found.name == str(tmp_path / "away/base")


@pytest.mark.parametrize(
    ("base", "name", "weights"),
    [
        ("smollm2", HUB, "the packaged weights of smollm2 have 4 bits a number"),
        ("hf:owner/name", "owner/name", ""),
    ],
)
def test_a_base_that_peft_can_load_is_named(base: str, name: str, weights: str, tmp_path: Path) -> None:
    model = random_model(SHAPES["llama"])
    add_lora(model, LoRAConfig(rank=2))
    write_adapter(model, tmp_path / "sft", base=base)
    settings = json.loads((tmp_path / "sft/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == name
    told = (tmp_path / "sft/adapter/README.md").read_text()
    assert f"base_model: {name}" in told and ("rounded weights" in told) == bool(weights)
    found = read_origin(tmp_path / "sft/adapter")
    assert found is not None and (found.hub, found.weights) == (name, weights)


def test_the_revision_is_the_one_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    file = tmp_path / "models--owner--name/snapshots/0123abcd/config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file_name: str(file))
    assert origin_of("hf:owner/name", tmp_path).revision == "0123abcd"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file_name: None)
    assert origin_of("hf:owner/name", tmp_path).revision == ""


def test_a_model_that_was_imported_is_known_by_its_source(tmp_path: Path) -> None:
    files.write_json(tmp_path / "mine/state.json", {"source": "smollm2"})
    found = origin_of(str(tmp_path / "mine"), tmp_path)
    assert found.hub == HUB and found.weights and found.name == str(tmp_path / "mine")


# ---- what is refused ---------------------------------------------------------------------------------------


def test_the_refusal_on_other_weights_says_where_it_belongs(road: Road, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on another model of this shape") as error:
        cw.load(f"{road.base}+{road.ppo}")
    assert f"it belongs on {road.base}+{road.sft / 'adapter'}: give " in str(error.value)
    right = cw.load(f"{road.base}+{road.sft}+{road.ppo}")
    torch.testing.assert_close(right.logits(IDS), road.logits, atol=1e-4, rtol=0)


def test_full_weights_are_no_4_bit_weights(tmp_path: Path) -> None:
    model = random_model(SHAPES["llama"])
    add_lora(model, LoRAConfig(rank=2))
    write_adapter(model, tmp_path / "sft", base="smollm2")
    with pytest.raises(UserError, match="belongs on smollm2") as error:
        load_peft(tmp_path / "sft/adapter", random_model(SHAPES["llama"], seed=1))
    assert f"4 bits a number, those of hf:{HUB} are others" in str(error.value)


@pytest.mark.parametrize("note", ["{", "[]", '{"name": 3}', '{"name": "x"}'])
def test_a_damaged_note_is_refused(note: str, road: Road) -> None:
    file = road.ppo / "adapter/adapter_model.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        header = opened.metadata()
    save_file(load_file(file), file, {**header, NOTE: note})
    with pytest.raises(UserError, match="in its header is damaged"):
        read_origin(road.ppo / "adapter")


# ---- written for PEFT --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft() -> Any:
    with old_names():
        return pytest.importorskip("peft", reason="parity with PEFT is NOT tested: pip install peft")


def test_merged_into_one(peft: Any, road: Road, run: Run, tmp_path: Path) -> None:
    code, out, err = run("export", road.ppo, "out", "--format", "peft")
    assert (code, err) == (0, "") and "PEFT loads the base model from" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base",
    ]
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "out/base")
    with old_names(), torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(theirs(IDS).logits, road.logits, atol=1e-4, rtol=0)
    ours = cw.load(f"{road.base}+{tmp_path / 'out'}")  # the fingerprint is that of the model at the bottom
    torch.testing.assert_close(ours.logits(IDS), road.logits, atol=1e-4, rtol=0)


def test_stacked_side_by_side(peft: Any, road: Road, run: Run, tmp_path: Path) -> None:
    code, out, err = run("export", road.ppo, "out", "--format", "peft", "--adapters", "stacked")
    assert (code, err) == (0, "") and "Written: out/1-sft, out/2-ppo" in out
    with old_names(), torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(
            their_model(tmp_path / "out/base"), tmp_path / "out/1-sft", adapter_name="1-sft"
        )
        theirs.load_adapter(tmp_path / "out/2-ppo", adapter_name="2-ppo")
        theirs.base_model.set_adapter(["1-sft", "2-ppo"])
        torch.testing.assert_close(theirs.eval()(IDS).logits, road.logits, atol=1e-4, rtol=0)
    assert "set_adapter(['1-sft', '2-ppo'])" in (tmp_path / "out/README.md").read_text()
    ours = cw.load(f"{road.base}+{tmp_path / 'out/1-sft'}+{tmp_path / 'out/2-ppo'}")
    torch.testing.assert_close(ours.logits(IDS), road.logits, atol=1e-4, rtol=0)


def test_what_differs_is_not_kept(
    road: Road, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged adapter without the factor of its parts is another model, and is refused."""
    from chatwright.interop import adapter_export

    def unscaled(place: Path) -> Any:
        return {path: (a, b / 2) for path, (a, b) in scaled(place).items()}

    scaled = adapter_export._scaled
    monkeypatch.setattr(adapter_export, "_scaled", unscaled)
    code, _, err = run("export", road.ppo, "out", "--format", "peft")
    assert code == 1 and "what was written differs" in one_line(err)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_as_adapters(road: Road, run: Run, tmp_path: Path) -> None:
    code, _, err = run("export", road.base, "out", "--format", "peft")
    assert code == 1 and "has no adapter: --format peft is for a finished sft, ppo" in one_line(err)
    code, _, err = run("export", road.base, "out", "--format", "hf", "--adapters", "stacked")
    assert code == 2 and "belong to --format peft" in one_line(err)
    shutil.rmtree(road.sft / "adapter")
    code, _, err = run("export", road.ppo, "out", "--format", "peft")
    assert code == 1 and "which is not there any more" in one_line(err)
    assert not (tmp_path / "out").exists()
