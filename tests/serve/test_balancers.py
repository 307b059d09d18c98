"""nginx, HAProxy, systemd and Kubernetes with the configurations of the documents, as they stand there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatwright.chat import NATIVE
from chatwright.serve.operation.keys import line_for
from chatwright.tokenizer import Tokenizer
from support.documented import HOST, KEY, Replica, ask, block, free_port, placed, running, start
from support.waiting import reached, wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these programs are POSIX's")
MANY = "guide/serving-many.md"


def needs(program: str) -> pytest.MarkDecorator:
    """Skip, and say what goes untested."""
    reason = f"NO {program.upper()}: its documented configuration goes untested; apt-get install {program}"
    return pytest.mark.skipif(shutil.which(program, path=PATH) is None, reason=reason)


PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NGINX, HAPROXY = (shutil.which(name, path=PATH) or name for name in ("nginx", "haproxy"))


def nginx(folder: Path, port: int, servers: list[int]) -> list[str]:
    """The command that runs nginx with what stands in the document."""
    http = placed(
        block(MANY, "\nnginx:\n"),
        {
            "10.0.0.11:8000": f"127.0.0.1:{servers[0]}",
            "10.0.0.12:8000": f"127.0.0.1:{servers[1]}",
            "listen 80;": f"listen 127.0.0.1:{port};",
        },
    )
    temporary = "".join(
        f"{one}_temp_path {folder}/{one};\n" for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors.txt;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{head}http {{\naccess_log off;\n{temporary}{http}}}\n")
    return [NGINX, "-p", str(folder), "-e", f"{folder}/errors.txt", "-c", f"{folder}/nginx.conf"]


def haproxy(folder: Path, port: int, servers: list[int]) -> list[str]:
    """The same for HAProxy."""
    config = placed(
        block(MANY, "HAProxy asks"),
        {
            "10.0.0.11:8000": f"127.0.0.1:{servers[0]}",
            "10.0.0.12:8000": f"127.0.0.1:{servers[1]}",
            "bind :80": f"bind 127.0.0.1:{port}",
        },
    )
    (folder / "haproxy.cfg").write_text(config)
    return [HAPROXY, "-db", "-f", f"{folder}/haproxy.cfg"]


Balancer = Callable[[Path, int, list[int]], list[str]]
BALANCERS = [pytest.param(nginx, marks=needs("nginx")), pytest.param(haproxy, marks=needs("haproxy"))]


@pytest.mark.parametrize(
    ("balancer", "check"),
    [pytest.param(nginx, "-t", marks=needs("nginx")), pytest.param(haproxy, "-c", marks=needs("haproxy"))],
)
def test_the_configuration_is_one(balancer: Balancer, check: str, tmp_path: Path) -> None:
    checked = subprocess.run(
        [*balancer(tmp_path, 8080, [8001, 8002]), check], capture_output=True, text=True, timeout=30
    )
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr.lower(), checked.stderr


@needs("nginx")
def test_the_proxy_for_tls_is_one(tmp_path: Path) -> None:
    location = block("guide/serving.md", "than an answer takes. nginx:")
    head = f"pid {tmp_path}/pid; error_log {tmp_path}/errors.txt;\nevents {{}}\n"
    (tmp_path / "nginx.conf").write_text(
        f"{head}http {{ access_log off; server {{ listen 127.0.0.1:8080;\n{location}}} }}\n"
    )
    command = [NGINX, "-t", "-e", f"{tmp_path}/errors.txt", "-c", f"{tmp_path}/nginx.conf"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0 and "warn" not in checked.stderr, checked.stderr


# ---- two servers and a balancer ----------------------------------------------------------------------------


class Farm:
    """Two servers, started by the documented command, behind a balancer."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        (folder / "keys.txt").write_text(line_for("anna", KEY))
        self.ports = [free_port(), free_port()]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.replicas: list[Replica] = [self.start(port) for port in self.ports]
        for one in self.replicas:
            one.wait_until_ready()

    def start(self, port: int) -> Replica:
        command = placed(
            block(MANY, "## Several servers behind a load balancer"),
            {"/models/mine": str(self.model), "0.0.0.0": "127.0.0.1", "10.0.0.1": "127.0.0.1"},
        )
        # Settings under which a request can be made that is always refused, with 429 or with 503.
        more = (
            "--store",
            "none",
            "--max_requests",
            "4",
            "--models",
            json.dumps([f"large={self.model}"]),
            "--memory_gb",
            "1e-6",
        )
        return start(
            command, self.folder, port=port, more=(*more, "--access_log", str(self.folder / "access.jsonl"))
        )

    def log(self) -> list[dict[str, Any]]:
        """The servers' lines, once there is one for a completion."""

        def whole() -> str:
            text = (self.folder / "access.jsonl").read_text()
            return text if "/v1/chat" in text and text.endswith("\n") else ""

        text = wait_until(whole, "a completion in the log")
        return [json.loads(line) for line in text.splitlines()]


@contextmanager
def farm(balancer: Balancer, folder: Path, model: Path) -> Iterator[Farm]:
    with ExitStack() as stack:
        made = Farm(folder, model)
        stack.callback(lambda: [one.end(kill=True) for one in made.replicas])
        stack.enter_context(running(*balancer(folder, made.port, made.ports), cwd=folder))

        def passes_on() -> bool:
            response = reached(f"{made.url}/ready", headers={"host": HOST})
            return response is not None and response.status_code == 200

        wait_until(passes_on, "a balancer that passes requests on")
        yield made


def stream(farm: Farm) -> tuple[str, list[float]]:
    """A streamed answer that is not short, and when its parts came."""
    ends = NATIVE.end_ids(Tokenizer.load(farm.model / "tokenizer.json"))
    body = {
        "model": "mine",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 120,
        "stream": True,
        "seed": 1,
        "logit_bias": {str(one): -100 for one in ends},
    }
    headers = {"host": HOST, "authorization": f"Bearer {KEY}"}
    text, times = "", []
    # Another address than the balancer's, to see whose the log has.
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.9"), timeout=60) as client:
        with client.stream("POST", f"{farm.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status_code == 200
            for part in response.iter_text():
                text += part
                times.append(time.monotonic())
    return text, times


def statuses(farm: Farm, count: int) -> list[int]:
    return [ask(farm.url).status_code for _ in range(count)]


@contextmanager
def held(replica: Replica) -> Iterator[None]:
    """A request under way: its body has not come as a whole."""
    with socket.create_connection(("127.0.0.1", replica.port)) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}\r\nauthorization: Bearer "
            f"{KEY}\r\ncontent-length: 100\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        wait_until(
            lambda: replica.metric("chatwright_http_requests_in_flight") > 1,
            "the request to begin",  # the other one is ours
        )
        yield


@pytest.mark.slow
@pytest.mark.parametrize("balancer", BALANCERS)
def test_two_servers_behind_a_balancer(balancer: Balancer, tmp_path: Path, chat_dir: Path) -> None:
    with farm(balancer, tmp_path, chat_dir) as made:
        assert httpx.get(f"{made.url}/v1/models", headers={"host": HOST}).status_code == 401
        text, times = stream(made)
        assert text.count("data: {") > 60 and text.rstrip().endswith("data: [DONE]")
        assert len(times) > 20, "the answer came in few large pieces: the balancer holds it back"
        line = next(one for one in made.log() if one["path"].startswith("/v1/chat"))
        assert (line["client"], line["key"], line["status"]) == ("127.0.0.9", "anna", 200)

        for _ in range(4):  # refusals come through, and do not put the servers off
            full, large = ask(made.url, n=5), ask(made.url, model="large")
            assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert (large.status_code, large.json()["error"]["code"]) == (503, "model_not_loaded")
            assert int(full.headers["retry-after"]) >= 1 and int(large.headers["retry-after"]) >= 1
        assert statuses(made, 4) == [200] * 4

        first, second = made.replicas
        with held(second):  # a server that finishes what is under way refuses what is new: the other is asked
            second.process.terminate()
            wait_until(lambda: ask(second.url).status_code == 503, "the refusal")
            assert statuses(made, 8) == [200] * 8
        assert second.end() == 0
        assert statuses(made, 4) == [200] * 4
        made.replicas[1] = made.start(second.port)
        made.replicas[1].wait_until_ready()

        def in_turn() -> bool:
            assert statuses(made, 1) == [200]
            return made.replicas[1].metric("chatwright_answers_total") > 0

        wait_until(in_turn, "requests to the new server", pause=0.2)  # HAProxy asks every two seconds
        first.end(kill=True)
        assert statuses(made, 8) == [200] * 8
        made.replicas[1].end(kill=True)
        assert ask(made.url).status_code in (502, 503)
