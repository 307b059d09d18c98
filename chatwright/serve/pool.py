"""The models of a server: which there are, which are in memory, and who has to make room for whom.

A model is loaded when it is first asked for. When the memory budget does not hold it beside the others, those that
nobody uses are put away, the longest unused one first. A model that is answering is never put away: who needs its
place is told to come again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from chatwright.config import UserError
from chatwright.generate.threads import EngineThread
from chatwright.language_model import LanguageModel, load
from chatwright.serve.footprint import weight_bytes
from chatwright.serve.service import Busy, ChatService

logger = logging.getLogger(__name__)


class UnknownModel(UserError):
    """No model of this name is served here."""


class NoMemory(Busy):
    """The model does not fit beside those that are answering."""


@dataclass(frozen=True)
class Spec:
    """A model that a server offers."""

    name: str
    """By this it is asked for."""
    source: str
    """What `chatwright.load` takes."""
    dtype: str = "auto"
    """How its weights are held (`LanguageModel`)."""


@dataclass
class _Place:
    """A spec, and its model when it is in memory."""

    spec: Spec
    service: ChatService | None = None
    users: int = 0
    last_used: float = 0.0
    size: int = 0
    """Bytes that it took when it was last in memory; 0 when it never was."""
    created: int = field(default_factory=lambda: int(time.time()))


class ModelPool:
    """Models by name. The first is the default one, where something has to be chosen.

    budget: most bytes for weights, packed weights and keys and values of all models in memory; None: no limit.
    max_requests: answers under way or waiting, per model.
    loader: makes a model of a spec; blocking, called in a thread.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        budget: int | None = None,
        max_requests: int = 64,
        loader: Callable[[Spec], LanguageModel] | None = None,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"the names of the models served must differ: {', '.join(names) or 'none is given'}")
        self._places = {spec.name: _Place(spec) for spec in specs}
        self._budget, self._max_requests = budget, max_requests
        self._loader = loader or (lambda spec: load(spec.source, dtype=spec.dtype))
        self._loading = asyncio.Lock()  # one at a time, or the budget would be spent twice
        self._closed = False

    @classmethod
    def of(cls, model: LanguageModel, name: str | None = None, *, max_requests: int = 64) -> ModelPool:
        """A pool of one model that is in memory already."""
        pool = cls([Spec(name or model.name, model.name)], max_requests=max_requests, loader=lambda _: model)
        pool.adopt(pool.default, model)
        return pool

    @property
    def names(self) -> list[str]:
        """All models, the default one first."""
        return list(self._places)

    @property
    def default(self) -> str:
        """The model to use where none is named."""
        return self.names[0]

    @property
    def services(self) -> list[ChatService]:
        """The models in memory."""
        return [place.service for place in self._places.values() if place.service is not None]

    @property
    def running(self) -> int:
        """Answers under way or waiting."""
        return sum(service.running for service in self.services)

    @property
    def memory(self) -> int:
        """Bytes that the models in memory take."""
        return sum(place.size for place in self._places.values() if place.service is not None)

    def created(self, name: str) -> int:
        """When the server began to offer the model, in seconds since 1970."""
        return self._place(name).created

    def check(self, name: str) -> None:
        """Raise UnknownModel unless there is a model of this name."""
        self._place(name)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ChatService]:
        """The model's service, loaded if need be; it stays in memory as long as somebody is inside.

        Raises UnknownModel, NoMemory, and UserError when loading fails.
        """
        place = self._place(name)
        place.users += 1
        try:
            if place.service is None:
                async with self._loading:
                    if place.service is None:
                        await self._load(place)
            assert place.service is not None
            yield place.service
        finally:
            place.users -= 1
            place.last_used = time.monotonic()

    def adopt(self, name: str, model: LanguageModel) -> None:
        """Take in a model that is in memory already."""
        place = self._place(name)
        engine = EngineThread(model.engine, max_waiting=self._max_requests)
        place.service = ChatService(model, engine, name=name, max_requests=self._max_requests)
        place.size = model.memory_bytes

    def cancel_all(self) -> None:
        """End every answer that is under way."""
        for service in self.services:
            service.cancel_all()

    def close(self) -> None:
        """End all answers and stop the engines."""
        self._closed = True
        for service in self.services:
            service.close()

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            known = ", ".join(map(repr, self._places))
            raise UnknownModel(f"the model {name!r} is not served here; this server has {known}")
        return self._places[name]

    async def _load(self, place: _Place) -> None:
        expected = place.size or await asyncio.to_thread(weight_bytes, place.spec.source, place.spec.dtype)
        await self._make_room(place, expected)
        started = time.monotonic()
        model = await asyncio.to_thread(self._loaded, place.spec)
        size = model.memory_bytes
        try:
            await self._make_room(place, size)  # now that it is known exactly
        except NoMemory:
            place.size = size
            raise
        if self._closed:
            raise UserError("the server is stopping")
        self.adopt(place.spec.name, model)
        seconds = time.monotonic() - started
        logger.info("loaded %s in %.1f s: %.2f GB", place.spec.name, seconds, place.size / 1e9)

    def _loaded(self, spec: Spec) -> LanguageModel:
        model = self._loader(spec)
        _ = model.engine  # weights are packed here and not at the first question
        return model

    async def _make_room(self, place: _Place, size: int) -> None:
        """Put models away until `size` bytes are free for `place`. Raises NoMemory."""
        if self._budget is None:
            return
        if size > self._budget:
            raise NoMemory(
                f"{place.spec.name} takes {size / 1e9:.2f} GB, and the budget for models is {self._budget / 1e9:.2f} GB: "
                "raise --memory_gb, or choose a smaller --dtype"
            )
        idle = sorted((one for one in self._places.values() if one.service and not one.users), key=_age)
        while self.memory + size > self._budget:
            if not idle:
                busy = ", ".join(one.spec.name for one in self._places.values() if one.service)
                raise NoMemory(f"{place.spec.name} does not fit beside {busy}, which are in use; try again in a moment")
            await self._put_away(idle.pop(0))

    async def _put_away(self, place: _Place) -> None:
        service, place.service = place.service, None
        assert service is not None
        await asyncio.to_thread(service.close)
        logger.info("put %s away", place.spec.name)
        del service
        gc.collect()  # models and engines refer to each other


def _age(place: _Place) -> float:
    return place.last_used


def parse_specs(models: Iterable[str], dtype: str) -> list[Spec]:
    """Specs of `MODEL` or `NAME=MODEL` texts."""
    specs = []
    for text in models:
        name, equals, source = text.partition("=")
        specs.append(Spec(name, source, dtype) if equals and name else Spec(text, text, dtype))
    return specs
