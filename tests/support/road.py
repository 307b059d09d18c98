"""A miniature of the road, each stage run once per session where a test needs it; and models whose weights
matter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from chatwright import files
from chatwright.data.examples import Dialogue, Document, LabelledText
from chatwright.language_model import load_parts
from chatwright.metrics import read_metrics
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain, reward, sft
from chatwright.stages import tokenizer as tokenizer_stage
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig
from chatwright.train.workspace import Report, Workspace
from support.babble import Babble  # the pipeline's and the road's tests use it as well
from support.planted import plant

SEED = 11 + int(os.environ.get("CHATWRIGHT_TEST_SEED", "0"))
"""Of the made-up records and of every stage of the miniature road. `make test-rounding` shifts it: what is
learnt must hold with any."""


@dataclass
class Bench:
    """Runs a stage the way the pipeline does: in a directory of its own, with a result.json at the end."""

    inputs: Mapping[str, Path]
    seed: ClassVar[int] = SEED

    def run(self, module: Any, config: Any, directory: Path, **facts: Any) -> Report:
        """Run, or go on with, a stage. `facts` are written over those of its report.

        Fails when the run has not logged a metric that every run of the stage logs, as its STAGE says.
        """
        directory.mkdir(parents=True, exist_ok=True)
        described = module.STAGE.metrics
        report: Report = module.run(config, Workspace(directory, SEED, self.inputs, described=described))
        logged = {key for row in read_metrics(directory / "metrics.jsonl") for key in row}
        missing = {metric.name for metric in described if not metric.when} - logged
        assert missing == set(), "never logged: mend the Metric, or say in `when` which runs log it"
        content = {
            "model": report.model,
            "facts": report.facts | facts,
            "warnings": report.warnings,
            "fingerprint": directory.name,
        }
        files.write_json(directory / "result.json", content)
        return report

    def with_(self, **more: Path) -> Bench:
        """A bench with further finished stages."""
        return Bench({**self.inputs, **more})


def write_records(directory: Path) -> None:
    """The files of the data stage."""
    draw = Babble(SEED)
    documents = [Document.of(draw.document()) for _ in range(240)]
    dialogues = [Dialogue.of(draw.messages()) for _ in range(260)]
    ratings = [LabelledText.of(*draw.rated()) for _ in range(400)]
    for prefix, records, held_out in (
        ("", documents, 20),
        ("dialogues-", dialogues, 60),
        ("ratings-", ratings, 80),
    ):
        for side, part in (("train", records[held_out:]), ("validation", records[:held_out])):
            text = "".join(record.to_json() + "\n" for record in part)
            files.write_text(directory / f"{prefix}{side}.jsonl", text)


@pytest.fixture(scope="session")
def data_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """After the data stage."""
    directory = tmp_path_factory.mktemp("road") / "data"
    write_records(directory)
    return Bench({"data": directory})


@pytest.fixture(scope="session")
def tokenizer_bench(data_bench: Bench) -> Bench:
    """After the tokenizer stage."""
    directory = data_bench.inputs["data"].parent / "tokenizer"
    data_bench.run(tokenizer_stage, tokenizer_stage.Config(vocab_size=400), directory)
    return data_bench.with_(tokenizer=directory)


def fit(**values: Any) -> FitConfig:
    """Settings for models so small that compilation, bf16 and threads do not pay."""
    return FitConfig(**{"batch_size": 8, "compile": False, "precision": "fp32", "log_every": 5, **values})


PRETRAIN = pretrain.Config(preset="modern-nano", model={"context": 64}, fit=fit(steps=120))


@pytest.fixture(scope="session")
def pretrain_bench(tokenizer_bench: Bench) -> Bench:
    """After pre-training."""
    directory = tokenizer_bench.inputs["data"].parent / "pretrain"
    tokenizer_bench.run(pretrain, PRETRAIN, directory)
    return tokenizer_bench.with_(pretrain=directory)


SFT = sft.Config(  # after 60 steps up to a third of the answers were not of the form that they all have
    fit=fit(steps=120), optim=OptimConfig(learning_rate=4e-3, schedule="trapezoid", decay=0.6), held_out=16
)


@pytest.fixture(scope="session")
def sft_bench(pretrain_bench: Bench) -> Bench:
    """After supervised fine-tuning."""
    directory = pretrain_bench.inputs["data"].parent / "sft"
    pretrain_bench.run(sft, SFT, directory)
    return pretrain_bench.with_(sft=directory)


REWARD = reward.Config(  # at a rate of 0.002, three of eight seeds learnt less than the test asks
    k=4,
    max_tokens=48,
    fit=fit(steps=240, batch_size=4),
    optim=OptimConfig(learning_rate=4e-3, schedule="trapezoid"),
)


@pytest.fixture(scope="session")
def reward_bench(sft_bench: Bench) -> Bench:
    """After the reward model."""
    directory = sft_bench.inputs["data"].parent / "reward"
    sft_bench.run(reward, REWARD, directory)
    return sft_bench.with_(reward=directory)


@pytest.fixture
def planted_bench(sft_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The miniature road with a reward that is known to be right."""
    plant(monkeypatch)
    return sft_bench.with_(reward=sft_bench.inputs["sft"])


@pytest.fixture(scope="session")
def babble() -> type[Babble]:
    """The class Babble: `babble(seed).document()`."""
    return Babble


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, here and in the processes that a test starts: sums are then made in the same order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_fit() -> Callable[..., FitConfig]:
    """`FitConfig` for miniature models."""
    return fit


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_bench: Bench) -> Tokenizer:
    """The tokenizer of the miniature road."""
    return Tokenizer.load(tokenizer_bench.inputs["tokenizer"])


@pytest.fixture(scope="session")
def sft_parts(sft_bench: Bench) -> Callable[[], Any]:
    """Makes a fresh copy of the miniature chat model at each call: model, tokenizer, template."""
    return lambda: load_parts(sft_bench.inputs["sft"])


def _liven(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)


@pytest.fixture(scope="session")
def lively_gpt() -> Callable[..., GPT]:
    """A small GPT with random numbers everywhere (fresh ones have zero output matrices: attention would not
    show)."""

    def make(seed: int = 0, **changes: Any) -> GPT:
        model = GPT(
            GPTConfig.preset("modern-nano", **{"vocab_size": 96, "context": 64, "tied": False, **changes})
        )
        _liven(model, seed)
        with torch.no_grad():
            model.head.weight.mul_(2.0)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def lively_scalar() -> Callable[..., ScalarModel]:
    """The same for a scalar model."""

    def make(seed: int = 0, **changes: Any) -> ScalarModel:
        config = GPTConfig.preset(
            "modern-nano", **{"vocab_size": 96, "context": 64, "tied": False, **changes}
        )
        model = ScalarModel(config)
        _liven(model, seed)
        return model.eval()

    return make
