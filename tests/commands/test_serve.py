"""The verb `serve`: addresses, ports, messages, the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from chatwright.commands.serve import ServeConfig, listen, main, make_pool
from chatwright.config import UsageError, UserError
from chatwright.serve.operation.guard import is_loopback
from support.serving import TinyModel


def test_a_busy_port_is_one_clear_line() -> None:
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    try:
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            main(["whatever", f"--port={port}"])
    finally:
        first.close()
    again = listen("127.0.0.1", port)  # free again at once
    again.close()


def test_addresses() -> None:
    with listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        socket.create_connection((host, port), timeout=10).close()
    with pytest.raises(UserError, match="no address"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UserError, match="cannot listen"):
        listen("192.0.2.1", 0)  # a documentation address: never this machine's
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "a.localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "example.org", "localhost.example.org", "", "127.0.0.1.nip.io"))
    )


def test_wrong_settings(tiny: TinyModel) -> None:
    for options in (["--port=70000"], ["--memory_gb=-1"], ["--max_requests=0"], ["--prot=1"], ["--port=x"]):
        with pytest.raises(UsageError):
            main(["model", *options])
    with pytest.raises(UserError, match="must differ"):
        make_pool(tiny, "x", ServeConfig(name="a", models=["a=y"]))


def test_a_missing_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        main([str(tmp_path / "nothing"), "--port=0"])


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'chatwright\[serve\]'"):
        main(["model", "--port=0"])


def test_importing_the_verb_is_light() -> None:
    code = (
        "import sys, chatwright.commands.serve, chatwright.commands.chat; "
        "print([name for name in ('torch', 'fastapi', 'uvicorn', 'rich', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to a child process")
def test_the_verb_serves_and_ctrl_c_ends_it(tiny: TinyModel, tmp_path: Path) -> None:
    """The whole verb in a process of its own; only the loading of the model is replaced."""
    import torch

    parts = tmp_path / "parts.pt"
    torch.save({"config": tiny.model.config.to_dict(), "weights": tiny.model.state_dict()}, parts)
    tiny.tokenizer.save(tmp_path)
    program = f"""
import sys, torch, chatwright.language_model as lm
from chatwright.chat import NATIVE
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
def load(name, dtype="auto"):
    parts = torch.load({str(parts)!r}, weights_only=True)
    model = GPT(GPTConfig.from_dict(parts["config"]))
    model.load_state_dict(parts["weights"])
    return lm.LanguageModel(model, Tokenizer.load({str(tmp_path)!r}), NATIVE, name)
lm.load = load
from chatwright.commands.serve import main
sys.exit(main(["some-model", "--port=0", "--store=none"]))
"""
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, child.kill)
    watchdog.start()
    try:
        assert child.stderr is not None
        said = ""
        while "Ctrl-C" not in said:
            line = child.stderr.readline()
            assert line, said
            said += line
        assert "some-model" in said
        url = said.partition("chat page")[2].split()[0]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}v1/models", timeout=30).json()["data"][0]["id"] == "some-model"
        body = {"model": "some-model", "messages": [{"role": "user", "content": "story"}], "stream": True}
        with httpx.stream("POST", f"{url}v1/chat/completions", json=body, timeout=30) as response:
            child.send_signal(signal.SIGINT)
            assert response.read().endswith(b"data: [DONE]\n\n")  # a stream is ended, not torn off
        assert child.wait(30) == 0
        rest = child.stderr.read()
        assert "Traceback" not in rest
        assert "stopped" in rest
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2])), timeout=5)
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        if child.stderr:
            child.stderr.close()
