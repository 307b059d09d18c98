"""A tiny chat model that is real in every part, taught a few dialogues by heart, and ways to serve it."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from chatwright.chat import NATIVE, Message
from chatwright.generate.engine import Engine
from chatwright.language_model import LanguageModel
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

MARKDOWN = (
    "Look: **bold** <script>window.hacked=1</script> <img src=x onerror=alert(1)> "
    "[a](javascript:alert(1))\n\n```python\nx = 1\n```"
)
ESCAPES = "red \x1b[31m[bold]not markup[/bold]\x07 end"
STORY = "Once upon a time there was a small model. " * 6
DIALOGUES = {
    "hello": "Hello there, friend!",
    "name?": "I am a very small model.",
    "markdown": MARKDOWN,
    "escapes": ESCAPES,
    "story": STORY,
    "snowman": "a ☃ for you",
}
"""Question -> the answer that the taught model gives by heart."""


class GatedEngine(Engine):
    """An engine that a test can hold still between two steps: no test needs to guess how long something
    takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Condition()
        self.allowed: float = float("inf")
        self.steps = 0

    def step(self) -> bool:
        """One step, when allowed."""
        with self.gate:
            while self.allowed <= 0 and not self._someone_left():
                self.gate.wait(0.02)
            self.allowed -= 1
            self.steps += 1
        return super().step()

    def _someone_left(self) -> bool:
        with self._scheduler.arrived:
            return any(row.handle.cancelled for row in [*self._scheduler.running, *self._scheduler.waiting])

    def allow(self, steps: float) -> None:
        """Let the engine do so many more steps and then hold it."""
        with self.gate:
            self.allowed = steps
            self.gate.notify_all()


class TinyModel(LanguageModel):
    """A language model with an engine that can be held."""

    engine: GatedEngine  # type: ignore[assignment]

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer, NATIVE, "tiny/taught")
        self.engine = GatedEngine(self.model, self.tokenizer)


def _teach(model: GPT, tokenizer: Tokenizer) -> None:
    """Make `model` know DIALOGUES by heart: next-token prediction on the answers of all of them at once."""
    chats = [
        NATIVE.encode([Message(role="user", content=ask), Message(role="assistant", content=say)], tokenizer)
        for ask, say in DIALOGUES.items()
    ]
    longest = max(len(chat.ids) for chat in chats)
    ids = torch.tensor([chat.ids + [0] * (longest - len(chat.ids)) for chat in chats])
    mask = torch.tensor([chat.mask + [False] * (longest - len(chat.ids)) for chat in chats])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        logits = model(ids[:, :-1])[mask[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05, "the tiny model did not learn its dialogues"
    model.eval()


@pytest.fixture(scope="session")
def taught() -> tuple[GPT, Tokenizer]:
    """The weights and the tokenizer of the taught model; leave them as they are."""
    return _taught()


@functools.cache
def _taught() -> tuple[GPT, Tokenizer]:
    """Once in a process, however many folders' conftest.py take the fixture in."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([*DIALOGUES, *DIALOGUES.values()] * 4, 400)
    config = GPTConfig.preset("modern-nano", vocab_size=tokenizer.vocab_size, context=256)
    model = GPT(config)
    _teach(model, tokenizer)
    return model, tokenizer


@pytest.fixture
def tiny(taught: tuple[GPT, Tokenizer]) -> Iterator[TinyModel]:
    """The taught model with an engine of its own."""
    model = TinyModel(*taught)
    yield model
    model.engine.allow(float("inf"))


@pytest.fixture
def roomy(taught: tuple[GPT, Tokenizer]) -> Iterator[TinyModel]:
    """The same weights with room for long prompts (rotary positions need no table)."""
    small, tokenizer = taught
    large = GPT(replace(small.config, context=2048))
    large.load_state_dict(small.state_dict())
    model = TinyModel(large, tokenizer)
    yield model
    model.engine.allow(float("inf"))


@pytest.fixture
def small(small_tokenizer: Tokenizer) -> LanguageModel:
    """Another chat model, which has learnt nothing."""
    torch.manual_seed(1)
    config = GPTConfig.preset("modern-nano", vocab_size=small_tokenizer.vocab_size, context=128)
    return LanguageModel(GPT(config), small_tokenizer, NATIVE, "small")


@dataclass
class Running:
    """A server that listens."""

    url: str
    model: TinyModel
    app: Any


@contextmanager
def run_server(
    model: TinyModel, *, loader: Callable[[Any], LanguageModel] | None = None, **settings: Any
) -> Iterator[Running]:
    """`chatwright serve` in a thread: the real application, uvicorn and a real port. `loader` makes further
    models."""
    from chatwright.commands.serve import ServeConfig, build_app, listen, make_pool, make_server

    listener = listen("127.0.0.1", 0)
    config = ServeConfig(**{"store": "none", **settings})  # never the conversations of whoever runs the tests
    pool = make_pool(model, model.name, config)
    pool._loader = loader or pool._loader
    app = build_app(pool, config)
    server = make_server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", model, app)
    finally:
        server.should_exit = True
        # An answer that is held through the draining is interrupted; released before, it might end by itself.
        thread.join(3)
        model.engine.allow(float("inf"))
        thread.join(20)
        listener.close()
        # Clients of libraries leave their sockets to the garbage collector, which would complain in whichever
        # test it runs.
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def server(tiny: TinyModel) -> Iterator[Running]:
    """A running server of the taught model."""
    with run_server(tiny) as running:
        yield running


@pytest.fixture
def roomy_server(roomy: TinyModel) -> Iterator[Running]:
    """A running server of the taught model with a long context."""
    with run_server(roomy) as running:
        yield running
