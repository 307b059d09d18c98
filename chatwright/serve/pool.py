"""The models of a server: which it offers, which are in memory, and which are evicted.

A model is loaded when it is first asked for. If the memory budget does not hold it beside the others, unused
models are evicted (removed from memory), the longest unused one first. A model that is answering is never
evicted: a request that needs its memory is refused and told when to try again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields

from chatwright.config import UserError
from chatwright.generate.engine import Stats
from chatwright.generate.threads import ClosedError, EngineThread
from chatwright.language_model import LanguageModel, load
from chatwright.serve.footprint import weight_bytes
from chatwright.serve.operation.request_context import current, seconds_left, timed_out
from chatwright.serve.service import Busy, ChatService, Limits, Listener

logger = logging.getLogger(__name__)


class UnknownModel(UserError):
    """No model of this name is served here."""


class NoMemory(Busy):
    """The model does not fit beside those that are answering."""


@dataclass(frozen=True)
class Spec:
    """A model that a server offers."""

    name: str
    """Its name in requests."""
    source: str
    """What `chatwright.load` takes."""
    dtype: str = "auto"
    """Precision of its weights (`LanguageModel`)."""


@dataclass
class _Entry:
    """A spec, and its model when it is in memory."""

    spec: Spec
    service: ChatService | None = None
    users: int = 0
    last_used: float = 0.0
    size: int = 0
    """Bytes that it took when it was last in memory; 0 if it never was."""
    created: int = field(default_factory=lambda: int(time.time()))
    loading: asyncio.Task[None] | None = None
    problem: str = ""
    """Why the last attempt to load it failed."""
    past: Stats = field(default_factory=Stats)
    """Sum of the statistics of its evicted engines."""


class ModelPool:
    """Models by name. The first is the default one, used where no model is named.

    budget: most bytes for weights, packed weights, and keys and values of all models in memory; None: no
    limit. limits: those of each model for its clients. own_defaults: as in `ChatService`. loader: makes a
    model from a spec; it blocks and is called in a thread.

    Objects appended to `listeners` receive the timings of answers.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        budget: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        own_defaults: bool = True,
        loader: Callable[[Spec], LanguageModel] | None = None,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"the names of the models served must differ: {', '.join(names) or 'none is given'}"
            )
        self._entries = {spec.name: _Entry(spec) for spec in specs}
        self._budget, self._limits, self._own_defaults = budget, limits, own_defaults
        self.listeners: list[Listener] = []
        self._loader = loader or (lambda spec: load(spec.source, dtype=spec.dtype))
        self._loading = asyncio.Lock()  # one at a time: two loads at once could both count on the same memory
        self._closed = False

    @classmethod
    def of(cls, model: LanguageModel, name: str | None = None, *, limits: Limits = Limits()) -> ModelPool:  # noqa: B008
        """A pool of one model that is in memory already."""
        pool = cls([Spec(name or model.name, model.name)], limits=limits, loader=lambda _: model)
        pool.adopt(pool.default, model)
        return pool

    @property
    def names(self) -> list[str]:
        """All models, the default one first."""
        return list(self._entries)

    @property
    def default(self) -> str:
        """The model to use where none is named."""
        return self.names[0]

    @property
    def services(self) -> list[ChatService]:
        """The models in memory."""
        return [entry.service for entry in self._entries.values() if entry.service is not None]

    @property
    def running(self) -> int:
        """Answers under way or waiting."""
        return sum(service.running for service in self.services)

    @property
    def memory(self) -> int:
        """Bytes that the models in memory take."""
        return sum(entry.size for entry in self._entries.values() if entry.service is not None)

    @property
    def unready(self) -> str:
        """Why the default model cannot answer, or "" if it can: if it is in memory, or was evicted."""
        entry = self._entry(self.default)
        if entry.problem:
            return f"{self.default} could not be loaded: {entry.problem}"
        if entry.service is not None and not entry.service.engine.alive:
            return f"the engine of {self.default} has ended"
        return "" if entry.service is not None or entry.size else f"{self.default} is not loaded yet"

    @property
    def dead(self) -> list[str]:
        """Models whose engines have ended without being closed: only a restart of the server helps."""
        return [one.name for one in self.services if not one.engine.alive and not self._closed]

    def size(self, name: str) -> int:
        """Bytes that a model takes; 0 when it is not in memory."""
        entry = self._entry(name)
        return entry.size if entry.service is not None else 0

    def stats(self, name: str) -> Stats:
        """Statistics of a model's engines since the server began, evicted engines included."""
        entry = self._entry(name)
        service = entry.service
        return entry.past if service is None else _sum(entry.past, service.model.engine.stats)

    def created(self, name: str) -> int:
        """When the server began to offer the model, in seconds since 1970."""
        return self._entry(name).created

    def check(self, name: str) -> None:
        """Raise UnknownModel unless there is a model of this name."""
        self._entry(name)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ChatService]:
        """The model's service, loaded if it is not in memory; it is not evicted while the context is open.

        Raises UnknownModel, NoMemory, TimedOut, ClosedError when the server stops, and UserError when loading
        fails.
        """
        entry = self._entry(name)
        if (known := current.get()) is not None:
            known.model = name
        entry.users += 1
        try:
            if entry.service is None:
                await self._wait_for(entry)
            assert entry.service is not None
            yield entry.service
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()

    @contextmanager
    def promised(self, name: str) -> Iterator[None]:
        """Reserve a slot for an answer that will be asked for in a moment: a request accepted now is not
        refused later.

        Leave the context just before `ChatService.prepare`, which takes a slot itself. If the model is not in
        memory yet, the requests that wait for it are counted. Raises UnknownModel, and Busy when no slot is
        free.
        """
        entry = self._entry(name)
        if entry.service is not None:
            with entry.service.occupied():
                yield
            return
        if entry.users >= self._limits.max_requests:
            raise Busy(f"{entry.users} requests wait for {name} to be loaded; try again in a moment")
        yield

    async def _wait_for(self, entry: _Entry) -> None:
        """Load the model, or wait for the load that is under way.

        A request that ends meanwhile (its time is up, or its client has gone) does not stop the load: a
        thread cannot be stopped, and a second load beside it would take the memory twice.
        """
        while entry.service is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load_in_turn(entry))
                # Reads the exception, or asyncio would log that nobody did.
                entry.loading.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.wait_for(asyncio.shield(entry.loading), seconds_left(self._limits.timeout))
            except TimeoutError:
                raise timed_out(self._limits.timeout) from None

    async def _load_in_turn(self, entry: _Entry) -> None:
        try:
            async with self._loading:
                await self._load(entry)
            entry.problem = ""
        except Busy:
            raise
        except Exception as error:
            entry.problem = str(error) or type(error).__name__
            raise
        finally:
            entry.loading = None

    def adopt(self, name: str, model: LanguageModel) -> None:
        """Add a model that is in memory already."""
        entry = self._entry(name)
        # The service limits and counts the requests that pass through it. The engine's own limit is for
        # requests that do not.
        engine = EngineThread(model.engine, max_waiting=2 * self._limits.max_requests)
        entry.service = ChatService(
            model,
            engine,
            name=name,
            limits=self._limits,
            listeners=self.listeners,
            own_defaults=self._own_defaults,
        )
        entry.size = model.memory_bytes

    def cancel_all(self) -> None:
        """End every answer that is under way."""
        for service in self.services:
            service.cancel_all()

    def close(self) -> None:
        """End all answers and stop the engines."""
        self._closed = True
        for service in self.services:
            service.close()

    def _entry(self, name: str) -> _Entry:
        """The model of this name; a model with a name of its own is also found by what it was loaded from, so
        that clients of before it had one go on to work."""
        found = self._entries.get(name)
        if found is not None:
            return found
        same = [entry for entry in self._entries.values() if entry.spec.source == name]
        if len(same) != 1:
            known = ", ".join(map(repr, self._entries))
            raise UnknownModel(f"the model {name!r} is not served here; this server has {known}")
        return same[0]

    async def _load(self, entry: _Entry) -> None:
        expected = entry.size or await asyncio.to_thread(weight_bytes, entry.spec.source, entry.spec.dtype)
        await self._make_room(entry, expected)
        started = time.monotonic()
        model = await asyncio.to_thread(self._loaded, entry.spec)
        size = model.memory_bytes
        try:
            await self._make_room(entry, size)  # again: the exact size is known only now
        except NoMemory:
            entry.size = size
            raise
        if self._closed:
            raise ClosedError("the server is stopping")
        self.adopt(entry.spec.name, model)
        seconds = time.monotonic() - started
        logger.info("loaded %s in %.1f s: %.2f GB", entry.spec.name, seconds, entry.size / 1e9)

    def _loaded(self, spec: Spec) -> LanguageModel:
        model = self._loader(spec)
        _ = model.engine  # packs the weights now, not at the first request
        return model

    async def _make_room(self, entry: _Entry, size: int) -> None:
        """Evict models until `size` bytes are free for `entry`. Raises NoMemory."""
        if self._budget is None:
            return
        if size > self._budget:
            raise NoMemory(
                f"{entry.spec.name} takes {size / 1e9:.2f} GB, and the budget for models is "
                f"{self._budget / 1e9:.2f} GB: raise --memory_gb, or choose a smaller --dtype"
            )
        idle = sorted((one for one in self._entries.values() if one.service and not one.users), key=_age)
        while self.memory + size > self._budget:
            if not idle:
                busy = ", ".join(one.spec.name for one in self._entries.values() if one.service)
                raise NoMemory(
                    f"{entry.spec.name} does not fit beside {busy}, which are in use; try again in a moment"
                )
            await self._evict(idle.pop(0))

    async def _evict(self, entry: _Entry) -> None:
        service, entry.service = entry.service, None
        assert service is not None
        await asyncio.to_thread(service.close)
        entry.past = _sum(entry.past, service.model.engine.stats)
        logger.info("evicted %s", entry.spec.name)
        del service
        gc.collect()  # models and engines refer to each other, so reference counts never free them


def _sum(one: Stats, other: Stats) -> Stats:
    return Stats(
        **{field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(Stats)}
    )


def _age(entry: _Entry) -> float:
    return entry.last_used


def parse_specs(models: Iterable[str], dtype: str) -> list[Spec]:
    """Specs from texts `MODEL` or `NAME=MODEL`."""
    specs = []
    for text in models:
        name, equals, source = text.partition("=")
        specs.append(Spec(name, source, dtype) if equals and name else Spec(text, text, dtype))
    return specs
