"""The engine behind a server: many clients, failures, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from chatwright.config import UserError
from chatwright.generate.engine import Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.generate.threads import BusyError, EngineThread
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from support.waiting import wait_until

MakeModel = Callable[..., GPT]
SECONDS = 20
"""Far longer than anything here takes."""


class Gate(GPT):
    """Waits for its gate at each pass and fails on token 13."""

    gate: threading.Event
    entered: threading.Event

    def hidden(self, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(SECONDS)
        if (ids == 13).any():
            raise ValueError("token 13")
        return super().hidden(ids, **arguments)


def gated(model: GPT) -> Gate:
    model.__class__ = Gate
    assert isinstance(model, Gate)
    model.gate, model.entered = threading.Event(), threading.Event()
    return model


def test_eight_clients_get_what_each_would_get_alone(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model()
    requests = [Request((1, at % 7, at), Sampling(10 + at % 5, temperature=0.9, seed=at)) for at in range(40)]
    alone = [Engine(model, tokenizer).generate([request])[0] for request in requests]
    with EngineThread(Engine(model, tokenizer, max_batch=5)) as thread, ThreadPoolExecutor(8) as clients:

        def client(number: int) -> None:
            for at in range(number, 40, 8):
                handle = thread.submit(requests[at])
                pieces = list(handle.pieces())
                assert [token for piece in pieces for token in piece.ids] == alone[at].ids
                assert "".join(piece.text for piece in pieces) == alone[at].text
                assert handle.result().text == alone[at].text

        for future in [clients.submit(client, number) for number in range(8)]:
            future.result(SECONDS)
        assert not thread.engine.busy


def test_an_error_reaches_its_requests_and_the_thread_lives_on(make_model: MakeModel) -> None:
    model = gated(make_model())
    model.gate.set()
    with EngineThread(Engine(model)) as thread:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="generation failed: token 13"):
                list(thread.submit(Request((13,))).pieces())
            assert len(thread.submit(Request((1,), Sampling(5, 0.0))).result().ids) == 5
        with pytest.raises(UserError, match="no tokens"):  # told to the caller at once
            thread.submit(Request(()))


def test_cancelling_a_stream_frees_its_place(make_model: MakeModel) -> None:
    with EngineThread(Engine(make_model(context=4_000), max_batch=1)) as thread:
        endless = thread.submit(Request((1,), Sampling(3_900)))
        for count, _ in enumerate(endless.pieces()):
            if count == 2:
                break
        assert not endless.finished
        endless.cancel()
        assert thread.submit(Request((2,), Sampling(3))).result().finish_reason == "length"
        assert endless.result().finish_reason == "cancelled"
        assert 2 < len(endless.result().ids) < 3_900


def test_a_slow_reader_gets_everything_at_once(make_model: MakeModel) -> None:
    with EngineThread(Engine(make_model())) as thread:
        handle = thread.submit(Request((1,), Sampling(20)))
        wait_until(lambda: handle.finished)
        pieces = list(handle.pieces())
        assert len(pieces) == 1
        assert pieces[0].ids == handle.result().ids


def test_too_many_waiting_requests_are_refused(make_model: MakeModel) -> None:
    model = gated(make_model())
    request = Request((1,), Sampling(2))
    with EngineThread(Engine(model, max_batch=1), max_waiting=2) as thread:
        handles = [thread.submit(request)]
        assert model.entered.wait(SECONDS)  # the first has left the queue
        handles += [thread.submit(request), thread.submit(request)]
        with pytest.raises(BusyError, match="2 requests are waiting"):
            thread.submit(request)
        model.gate.set()
        assert [len(handle.result().ids) for handle in handles] == [2, 2, 2]
        assert len(thread.submit(request).result().ids) == 2
    with pytest.raises(UserError, match="max_waiting"):
        EngineThread(Engine(make_model()), max_waiting=0)


def test_close_is_quick_and_ends_every_request(make_model: MakeModel) -> None:
    thread = EngineThread(Engine(make_model(context=4_000), max_batch=2))
    handles = [thread.submit(Request((at,), Sampling(3_900))) for at in range(5)]
    next(handles[0].pieces())
    thread.close()
    assert not thread._thread.is_alive()
    assert [handle.result().finish_reason for handle in handles] == ["cancelled"] * 5
    assert not thread.engine.busy
    with pytest.raises(UserError, match="closed"):
        thread.submit(Request((1,)))
    thread.close()  # twice does no harm


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_clients_survive_when_the_thread_dies(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated(make_model())
    with EngineThread(Engine(model, max_batch=1)) as thread:
        running, waiting = thread.submit(Request((1,))), thread.submit(Request((2,)))
        assert model.entered.wait(SECONDS)

        def leave(*_: object, **__: object) -> None:
            raise SystemExit

        monkeypatch.setattr(model, "hidden", leave)
        model.gate.set()
        with pytest.raises(RuntimeError, match="SystemExit"):
            running.result()
        assert waiting.result().finish_reason == "cancelled"
        with pytest.raises(UserError, match="closed"):
            thread.submit(Request((3,)))
