"""The end of a server: signals, and what becomes of the answers under way."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest

from chatwright import checkpoint
from chatwright.chat import NATIVE
from chatwright.model.gpt import GPT
from chatwright.serve.operation.keys import line_for
from chatwright.tokenizer import Tokenizer
from support.asking import HELLO, STORY, STORY_TEXT, post, reasons_of, text_of
from support.person import Person
from support.serving import TinyModel, run_server
from support.waiting import wait_until


def test_draining(tiny: TinyModel) -> None:
    """What is under way goes on; what is new is told to come again; then it is over."""
    with run_server(tiny, drain_seconds=30) as server, Person(server.url) as person:
        engine = tiny.engine
        engine.allow(5)
        chat = f"{server.url}/v1/chat/completions"
        conversation, job = person.start("story")
        with httpx.stream("POST", chat, json={**STORY, "stream": True}, timeout=30) as response:
            chunks = response.iter_text()
            begun = next(chunks)
            server.app.state.lifecycle.draining = True  # what the signal does
            assert httpx.get(f"{server.url}/ready").json() == {
                "status": "not ready",
                "reason": "the server is stopping",
            }
            for refused in (post(server, HELLO), httpx.get(f"{server.url}/v1/models"), httpx.get(server.url)):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
                assert (refused.headers["retry-after"], refused.headers["connection"]) == ("30", "close")
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert "chatwright_draining 1.0" in httpx.get(f"{server.url}/metrics").text
            engine.allow(float("inf"))
            assert (
                person.events(job)[-1]["turn"]["finish_reason"] == "stop"
            )  # a page that lost its connection
            assert person.read(conversation)["turns"]
            stream = begun + "".join(chunks)
        assert text_of(stream) == STORY_TEXT
        assert stream.endswith("data: [DONE]\n\n")
        port = int(server.url.rpartition(":")[2])

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except OSError:
                return True
            return False

        wait_until(closed, "the server to stop by itself")


def test_draining_ends_at_its_limit(tiny: TinyModel) -> None:
    with run_server(tiny, drain_seconds=0.3) as server:
        tiny.engine.allow(5)
        chat = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", chat, json={**STORY, "stream": True}, timeout=30) as response:
            chunks = response.iter_text()
            begun = next(chunks)
            server.app.state.lifecycle.draining = True
            stream = begun + "".join(chunks)
        assert stream.endswith("data: [DONE]\n\n")
        assert reasons_of(stream) == ["length"]  # OpenAI has no word for it
        assert 0 < len(text_of(stream)) < len(STORY_TEXT)


PROGRAM = """
import sys, time
from chatwright.generate.engine import Engine
step = Engine.step
def slow(self):
    time.sleep({pause})
    return step(self)
Engine.step = slow
from chatwright.cli import main
sys.exit(main(["serve", {directory!r}, "--port=0", "--name=m", *{options!r}]))
"""


@contextmanager
def child(directory: Path, *options: str, pause: float = 0.02) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`chatwright serve` in a process of its own, with steps that take as long as those of a larger model."""
    code = PROGRAM.format(directory=str(directory), options=["--store=none", *options], pause=pause)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, said.partition("chat page")[2].split()[0].rstrip("/")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="module")
def taught_dir(taught: tuple[GPT, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model as a model directory."""
    model, tokenizer = taught
    directory = tmp_path_factory.mktemp("models") / "taught"
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json(), "chat_template.jinja": NATIVE.source}
    checkpoint.save_checkpoint(
        directory, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts
    )
    return directory


@contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """The chunks of a story; when it begins, the first has come."""
    body = {**STORY, "model": "m", "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        chunks = response.iter_text()
        yield itertools.chain([next(chunks)], chunks)


posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to a child process")


@posix
def test_sigterm_lets_answers_finish(taught_dir: Path) -> None:
    with child(taught_dir, pause=0.05) as (process, url), streaming(url) as chunks:
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 20
        while httpx.get(f"{url}/ready").status_code == 200:
            assert time.monotonic() < end
        refused = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": []})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        stream = "".join(chunks)
        assert text_of(stream) == STORY_TEXT
        assert stream.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "stopping: 1 answers and 1 requests are under way and have 30 seconds" in rest
        assert "stopped" in rest and "Traceback" not in rest


@posix
def test_a_second_ctrl_c_ends_it_at_once(taught_dir: Path) -> None:
    with child(taught_dir, pause=0.4) as (process, url), streaming(url) as chunks:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "once more ends them now" in process.stderr.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        with suppress(httpx.HTTPError):  # ended or torn off, whichever is sooner
            assert text_of("".join(chunks)) != STORY_TEXT
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 10  # the story would take half a minute
        assert "Traceback" not in process.stderr.read()


@posix
def test_sighup_reads_the_keys_again_and_idle_connections_end(taught_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", "a" * 40))
    with child(taught_dir, f"--api_keys={keys}", pause=0.0) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a" * 40, max_retries=0)
        assert [model.id for model in client.models.list()] == ["m"]
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        said = process.stderr.readline()
        while "read the keys again: 1" not in said:
            said = process.stderr.readline()
            assert said
        assert [model.id for model in client.models.list()] == ["m"]  # it lives
        process.send_signal(signal.SIGTERM)  # the client is still connected, but wants nothing
        assert process.wait(10) == 0
        client.close()


@posix
def test_the_verb_refuses_to_serve_everybody(chat_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chatwright.cli", "serve", str(chat_dir), "--host=0.0.0.0", "--port=0"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "CHATWRIGHT_API_KEYS"},
        timeout=60,
    )
    assert done.returncode == 1
    assert "--insecure" in done.stderr and "Traceback" not in done.stderr
