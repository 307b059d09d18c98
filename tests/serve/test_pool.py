"""The models' pool: loading on demand, the memory budget, who has to make room, and what failures leave
behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.generate.sampling import Sampling
from chatwright.generate.threads import ClosedError
from chatwright.model.gpt import GPT
from chatwright.serve import pool as pool_module
from chatwright.serve.operation.request_context import TimedOut
from chatwright.serve.pool import ModelPool, NoMemory, Spec, UnknownModel, parse_specs
from chatwright.serve.service import ChatService, Limits
from chatwright.tokenizer import Tokenizer
from support.serving import DIALOGUES, GatedEngine, TinyModel


class Loader:
    """Makes tiny models, can be held while it does, and can fail."""

    def __init__(self, parts: tuple[GPT, Tokenizer]) -> None:
        self.parts = parts
        self.loaded: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.problem: Exception | None = None

    def __call__(self, spec: Spec) -> TinyModel:
        self.loaded.append(spec.name)
        assert self.gate.wait(20), "the loader was never let go"
        if self.problem is not None:
            raise self.problem
        return TinyModel(*self.parts)


@pytest.fixture
def loader(taught: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    made = Loader(taught)
    # What the sources' files would say beforehand: a little less than a model turns out to take.
    monkeypatch.setattr(pool_module, "weight_bytes", lambda *_: TinyModel(*taught).memory_bytes // 2)
    yield made
    made.gate.set()


def specs(*names: str) -> list[Spec]:
    return [Spec(name, f"runs/{name}") for name in names]


def run(check: Callable[[], Awaitable[Any]]) -> None:
    asyncio.run(asyncio.wait_for(check(), 30))  # type: ignore[arg-type]


async def ask(service: ChatService, question: str = "hello") -> str:
    prepared = await service.prepare(
        [Message(role="user", content=question)], Sampling(temperature=0.0, max_new_tokens=64)
    )
    return "".join([piece.text async for _, piece in service.answer(prepared)])


async def eventually(condition: Callable[[], Any]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the condition did not come true")


def size_of(parts: tuple[GPT, Tokenizer]) -> int:
    return TinyModel(*parts).memory_bytes


def test_a_model_is_loaded_when_it_is_first_asked_for_and_kept(loader: Loader) -> None:
    pool = ModelPool(specs("a", "b"), loader=loader)

    async def check() -> None:
        assert (pool.names, pool.default, pool.services, pool.memory) == (["a", "b"], "a", [], 0)
        assert "not loaded" in pool.unready
        for _ in range(2):
            async with pool.use("b") as service:
                assert service.name == "b"
                assert await ask(service) == DIALOGUES["hello"]
        assert loader.loaded == ["b"]
        assert pool.memory == pool.size("b") == size_of(loader.parts)
        assert pool.size("a") == 0
        assert "not loaded" in pool.unready  # b is not the default one
        async with pool.use("a"):
            assert pool.unready == ""
        with pytest.raises(UnknownModel, match=r"'c' is not served here; this server has 'a', 'b'"):
            async with pool.use("c"):
                pass

    run(check)
    pool.close()


def test_the_one_unused_longest_makes_room(loader: Loader) -> None:
    pool = ModelPool(specs("a", "b", "c"), budget=int(2.5 * size_of(loader.parts)), loader=loader)

    async def check() -> None:
        for name in ("a", "b", "a"):  # b is now the one unused longest, although a was loaded before it
            async with pool.use(name) as service:
                await ask(service)
        async with pool.use("c"):
            assert [service.name for service in pool.services] == ["a", "c"]
        before = pool.stats("b")
        assert before.new_tokens > 0, "what a model did is forgotten when it is put away"
        async with pool.use("b") as service:  # and now a has to go
            assert [service.name for service in pool.services] == ["b", "c"]
            await ask(service)
        assert pool.stats("b").new_tokens == 2 * before.new_tokens
        assert loader.loaded == ["a", "b", "c", "b"]
        assert pool.unready == ""  # a had to make room, and comes back when it is asked for

    run(check)
    pool.close()


def test_a_model_in_use_is_never_evicted(loader: Loader) -> None:
    pool = ModelPool(specs("a", "b", "c"), budget=int(2.5 * size_of(loader.parts)), loader=loader)

    async def check() -> None:
        async with pool.use("a") as used:
            async with pool.use("b"):
                with pytest.raises(NoMemory, match="c does not fit beside a, b, which are in use"):
                    async with pool.use("c"):
                        pass
            async with pool.use("c"):
                assert [service.name for service in pool.services] == ["a", "c"]
            assert await ask(used) == DIALOGUES["hello"]  # its engine was never stopped

    run(check)
    pool.close()


def test_a_budget_that_is_too_small(loader: Loader) -> None:
    size = size_of(loader.parts)
    expected = ModelPool(specs("a"), budget=size // 3, loader=loader)  # the files say that it cannot fit
    found = ModelPool(
        specs("a"), budget=int(0.75 * size), loader=loader
    )  # that it does not shows when it is there

    async def check() -> None:
        with pytest.raises(NoMemory, match=r"raise --memory_gb"):
            async with expected.use("a"):
                pass
        assert loader.loaded == []
        for _ in range(2):
            with pytest.raises(NoMemory, match=r"raise --memory_gb"):
                async with found.use("a"):
                    pass
        assert loader.loaded == ["a"], "it was loaded again, although its size was known"
        assert (found.memory, found.services) == (0, [])

    run(check)


def test_a_loader_that_fails_leaves_no_trace(loader: Loader) -> None:
    pool = ModelPool(specs("a", "b"), budget=int(2.5 * size_of(loader.parts)), loader=loader)

    async def check() -> None:
        loader.problem = UserError("the file is damaged")
        for _ in range(2):
            with pytest.raises(UserError, match="the file is damaged"):
                async with pool.use("a"):
                    pass
        assert (pool.services, pool.memory) == ([], 0)
        assert pool.unready == "a could not be loaded: the file is damaged"
        loader.problem = None
        async with pool.use("a") as service:
            assert await ask(service) == DIALOGUES["hello"]
        assert pool.unready == ""
        async with pool.use("b"):  # nobody is thought to be using a
            pass
        assert loader.loaded == ["a", "a", "a", "b"]

    run(check)
    pool.close()


def test_two_first_uses_at_a_time_load_once(loader: Loader) -> None:
    pool = ModelPool(specs("a"), loader=loader)

    async def use() -> str:
        async with pool.use("a") as service:
            return await ask(service)

    async def check() -> None:
        loader.gate.clear()
        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await eventually(lambda: loader.loaded)
        await asyncio.sleep(0.02)
        loader.gate.set()
        assert await asyncio.gather(*tasks) == [DIALOGUES["hello"]] * 5
        assert loader.loaded == ["a"]

    run(check)
    pool.close()


def test_who_gives_up_does_not_stop_the_loading(loader: Loader) -> None:
    pool = ModelPool(specs("a"), loader=loader, limits=Limits(timeout=0.2))

    async def use() -> None:
        async with pool.use("a"):
            pass

    async def check() -> None:
        loader.gate.clear()
        impatient, gone = asyncio.create_task(use()), asyncio.create_task(use())
        await eventually(lambda: loader.loaded)
        gone.cancel()
        with pytest.raises(TimedOut, match=r"0\.2 seconds"):
            await impatient
        loader.gate.set()
        await eventually(lambda: pool.services)
        assert loader.loaded == ["a"]

    run(check)
    pool.close()


def test_models_are_loaded_one_at_a_time(loader: Loader) -> None:
    """Or two that fit one by one would be in memory together before anybody looks."""
    pool = ModelPool(specs("a", "b"), budget=int(1.5 * size_of(loader.parts)), loader=loader)

    async def check() -> None:
        loader.gate.clear()
        first, second = pool.use("a"), pool.use("b")
        tasks = [asyncio.create_task(first.__aenter__()), asyncio.create_task(second.__aenter__())]
        await eventually(lambda: loader.loaded)
        await asyncio.sleep(0.02)
        assert loader.loaded == ["a"]
        loader.gate.set()
        await tasks[0]
        with pytest.raises(NoMemory):
            await tasks[1]
        await first.__aexit__(None, None, None)

    run(check)
    pool.close()


def test_close_while_a_model_is_loaded(loader: Loader) -> None:
    pool = ModelPool(specs("a"), loader=loader)

    async def use() -> None:
        async with pool.use("a"):
            pass

    async def check() -> None:
        loader.gate.clear()
        task = asyncio.create_task(use())
        await eventually(lambda: loader.loaded)
        pool.close()
        loader.gate.set()
        with pytest.raises(ClosedError, match="stopping"):
            await task
        assert pool.services == []

    run(check)
    assert not [thread for thread in threading.enumerate() if thread.name == "chatwright-engine"]


def test_closing_ends_answers_properly(taught: tuple[GPT, Tokenizer]) -> None:
    model = TinyModel(*taught)
    pool = ModelPool.of(model, "mine")

    async def check() -> None:
        model.engine.allow(5)
        async with pool.use("mine") as service:
            prepared = await service.prepare(
                [Message(role="user", content="story")], Sampling(temperature=0.0, max_new_tokens=200)
            )
            answer = service.answer(prepared)
            pieces = aiter(answer)
            await anext(pieces)
            pool.cancel_all()
            assert [piece.finish_reason async for _, piece in pieces][-1] == "cancelled"
            assert pool.running == 0

    run(check)
    model.engine.allow(float("inf"))
    pool.close()


def test_an_engine_that_ends_by_itself_is_told_of(
    taught: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fatal(BaseException):
        pass

    def fatal(_: GatedEngine) -> None:
        raise Fatal

    model = TinyModel(*taught)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    pool = ModelPool.of(model, "mine")

    async def check() -> None:
        assert (pool.dead, pool.unready) == ([], "")
        monkeypatch.setattr(GatedEngine, "_decode", fatal)
        async with pool.use("mine") as service:
            with pytest.raises(RuntimeError):
                await ask(service)
            await eventually(lambda: pool.dead == ["mine"])
            assert "ended" in pool.unready
            with pytest.raises(ClosedError):
                await ask(service)

    run(check)
    pool.close()


def test_specs_and_names() -> None:
    assert parse_specs(["runs/a", "small=runs/b", "=x", "a=b=c"], "int8") == [
        Spec("runs/a", "runs/a", "int8"),
        Spec("small", "runs/b", "int8"),
        Spec("=x", "=x", "int8"),
        Spec("a", "b=c", "int8"),
    ]
    for names in ((), ("a", "a")):
        with pytest.raises(UserError, match="must differ"):
            ModelPool(specs(*names))
