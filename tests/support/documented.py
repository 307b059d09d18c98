"""Configurations out of the documents, to be run as they stand but for places: addresses, ports, files."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from support.waiting import reached, wait_until

ROOT = Path(__file__).parents[2]
HOST = "chat.example.org"
"""The name under which the documents' servers are reached."""
KEY = "cw-" + "k" * 43


def block(page: str, after: str) -> str:
    """The first fenced block of docs/`page` behind the text `after`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.count(after) == 1, f"docs/{page} must have {after!r} once"
    found = re.search(r"^```\w*\n(.*?)^```", text.partition(after)[2], re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def placed(text: str, places: Mapping[str, str]) -> str:
    """`text` with the documents' places exchanged for ours; each must be in it."""
    for theirs, ours in places.items():
        assert theirs in text, f"{theirs} is not in the documented text:\n{text}"
        text = text.replace(theirs, ours)
    return text


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class Replica:
    """A `chatwright serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    errors: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Until it takes requests; fails with what it wrote where it ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            response = reached(f"{self.url}/ready", headers={"host": HOST})
            return response is not None and response.status_code == 200

        wait_until(ready, "a server that is ready")

    def metric(self, name: str) -> float:
        """One of its metrics, the sum over the labels."""
        headers = {"host": HOST, "authorization": f"Bearer {KEY}"}
        page = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, found))

    def end(self, *, kill: bool = False) -> int:
        """End it, by SIGKILL or in peace; its exit code."""
        if self.process.poll() is None:
            (self.process.kill if kill else self.process.terminate)()
        return self.process.wait(60)


def start(
    command: str, cwd: Path, *, port: int, env: Mapping[str, str] | None = None, more: tuple[str, ...] = ()
) -> Replica:
    """Run a documented `chatwright serve ...` with this port and `more` settings."""
    words = shlex.split(command)
    assert words[0].rpartition("/")[2] == "chatwright"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
    errors = cwd / f"replica-{port}.txt"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatwright", *words[1:], "--port", str(port), *more],
            cwd=cwd,
            env=variables,
            stderr=file,
        )
    return Replica(process, port, errors)


@contextmanager
def running(*command: str, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Some program, ended at the end."""
    process = subprocess.Popen(command, cwd=cwd)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str, **change: Any) -> httpx.Response:
    """A short chat completion, as a client of the documents' server sends it."""
    body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **change}
    headers = {"host": HOST, "authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
