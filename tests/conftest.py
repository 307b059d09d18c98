"""A tiny model in a directory of its own, whole and real but untrained, for tests that need any model at all.

The miniature road's fixtures (support/road.py) are there for every test, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from chatwright import checkpoint, runtime
from chatwright.chat import NATIVE
from chatwright.metrics import STRICT
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

pytest.register_assert_rewrite("support")
pytest_plugins = ["support.road"]

STARTED = time.monotonic()

# How long an example takes says nothing on a machine that does other things as well.
settings.register_profile("chatwright", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("chatwright")

TEXTS = (
    "Hello there, how are you today?",
    "I am fine, thank you. And you?",
    "naïve café — 東京 🙂",
    "don't 1234 stop!",
)


TESTS = Path(__file__).parent
LONGEST = (
    "faults/test_faults.py",
    "train/parallel/test_parallel.py",
    "train/test_resume.py",
    "e2e/test_browser_conversations.py",
    "e2e/test_browser_looks.py",
    "interop/test_llama_cpp.py",
    "serve/test_api.py",
    "generate/test_kernels.py",
    "train/planning/test_plan.py",
    "e2e/test_browser.py",
    "interop/test_fuzz.py",
    "serve/test_clients.py",
    "serve/test_draining.py",
    "serve/test_conversations.py",
    "train/parallel/test_parallel_alignment.py",
    "parity/test_smollm2.py",
    "stages/test_ppo.py",
    "serve/test_operation.py",
)
"""Files of more than half a minute each, longest first (`pytest --durations=0`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two workers, neither is then left with one of them when the other has
    nothing more to do (`--no-loadscope-reorder` in the Makefile; xdist alone would begin with the files that
    have the most tests)."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test begins with the same state of torch's global random stream, its fixtures included: what
    draws from it without a seed of its own is the same in every run."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How long all of it took, and where: `make test` says it, for CONTRIBUTING.md."""
    if not config.option.durations:
        return
    minutes, seconds = divmod(round(time.monotonic() - STARTED), 60)
    machine = runtime.describe()
    workers = getattr(config.option, "numprocesses", None) or 1
    terminalreporter.section("total")
    terminalreporter.write_line(
        f"{minutes} min {seconds:02} s, {workers} processes on {os.cpu_count()} cores "
        f"({machine['processor']}), torch {machine['torch']}, {time.strftime('%Y-%m-%d')}"
    )


@pytest.fixture(scope="session", autouse=True)
def same_precision_everywhere() -> Iterator[None]:
    """`auto` means float32 here, as on a machine without bf16: what a miniature learns must not depend on the
    processor. Tests of bf16 ask for it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATWRIGHT_BF16", "0")  # for the programs that tests start, too
        yield


@pytest.fixture(scope="session", autouse=True)
def every_logged_key_is_described() -> Iterator[None]:
    """A stage fails that logs a key which `metrics` of its STAGE does not describe, in programs that tests
    start as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STRICT, "1")
        yield


class Learnt:
    """Compares a number that was learnt with the bound it has to clear, and writes both down for `make
    test-rounding`."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self.record = record

    def __call__(
        self, what: str, value: float, *, above: float | None = None, below: float | None = None
    ) -> None:
        """Fail unless `value` is above, or below, the bound."""
        assert (above is None) != (below is None), "one bound"
        bound = above if above is not None else below
        self.record(f"learnt: {what}", json.dumps({"value": float(value), "above": above, "below": below}))
        clears = value > bound if above is not None else value < bound
        assert clears, f"{what} is {value:.4g}, asked {'above' if above is not None else 'below'} {bound:g}"


@pytest.fixture
def learnt(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Learnt:
    """For tests of what training achieves: `learnt("gain", gain(rows), above=0.5)`."""
    assert request.node.get_closest_marker("learns"), "a test that uses `learnt` is marked `learns`"
    return Learnt(record_property)


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """A few merges over the 256 bytes."""
    return Tokenizer.train(TEXTS * 4, 320)


def write_tiny(directory: Path, tokenizer: Tokenizer, *, chat: bool) -> Path:
    """Write an untrained model of the `modern-nano` shape as a model directory."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("modern-nano", vocab_size=tokenizer.vocab_size))
    torch.set_rng_state(state)
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json()}
    if chat:
        texts["chat_template.jinja"] = NATIVE.source
    checkpoint.save_checkpoint(
        directory, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts
    )
    return directory


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """A chat model; copy it before you change it."""
    return write_tiny(tmp_path_factory.mktemp("models") / "chat", small_tokenizer, chat=True)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """The same without a chat template."""
    return write_tiny(tmp_path_factory.mktemp("models") / "base", small_tokenizer, chat=False)
