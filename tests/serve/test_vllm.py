"""`chatwright serve --engine vllm`, against a stand-in for vLLM's program: what it is given, and that it
takes over."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import files
from chatwright.commands.serve import ServeConfig, main
from chatwright.config import UsageError, UserError
from chatwright.interop.hf import load_hf
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.serve import vllm
from chatwright.tokenizer import Tokenizer
from support.tooling import save
from support.waiting import reached, wait_until

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="the stand-in is a script with a first line that names Python"
)

RECORDS = """#!{python}
import json, os, sys
print("the stand-in runs")
json.dump({{"argv": sys.argv[1:], "pid": os.getpid(), "env": dict(os.environ)}}, open({record!r}, "w"))
sys.exit(7)
"""
SERVES = """#!{python}
import argparse, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("verb", choices=["serve"])
parser.add_argument("model_tag")
for name in ("host", "served-model-name", "dtype"):
    parser.add_argument("--" + name, required=True)
for name in ("port", "max-model-len"):
    parser.add_argument("--" + name, required=True, type=int)
given = parser.parse_args()
shape = json.load(open(given.model_tag + "/config.json"))
assert given.max_model_len == shape["max_position_embeddings"]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/v1/models"
        one = {{"id": given.served_model_name, "object": "model", "root": given.model_tag}}
        body = {{"object": "list", "data": [one]}}
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *_):
        pass
HTTPServer((given.host, given.port), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty PATH, this interpreter's own folder left out."""
    monkeypatch.setenv("CHATWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(vllm.sys, "executable", str(tmp_path / "nowhere" / "python"))
    return tmp_path


def stand_in(folder: Path, text: str) -> Path:
    """A program called vllm on PATH; where it will write what it was given."""
    program = folder / "bin" / "vllm"
    program.write_text(text.format(python=PYTHON, record=str(folder / "record.json")))
    program.chmod(0o755)
    return folder / "record.json"


PYTHON = sys.executable


@pytest.fixture
def given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The arguments that vLLM would be started with, the program's own name left out."""
    stand_in(folder, RECORDS)

    def call(*arguments: object) -> list[str]:
        seen: list[list[str]] = []
        monkeypatch.setattr(vllm, "_replace", lambda program, command: seen.append(command))
        monkeypatch.setattr(vllm.subprocess, "call", lambda command: 0)
        assert main([*map(str, arguments), "--engine", "vllm"]) == 0
        assert seen[0][0] == str(folder / "bin" / "vllm")
        return seen[0][1:]

    return call


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


# ---- what is handed over -----------------------------------------------------------------------------------


def test_a_model_of_ours_is_exported_once(
    given: Callable[..., list[str]], chat_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given(chat_dir, "--host=0.0.0.0", "--insecure", "--port=8123", "--name=mine")
    directory = Path(arguments[1])
    assert arguments == [
        "serve",
        str(directory),
        "--host",
        "0.0.0.0",
        "--port",
        "8123",
        "--served-model-name",
        "mine",
        "--max-model-len",
        "128",
        "--dtype",
        "float32",
    ]
    assert directory.parent == folder / "cache" / "vllm"
    ours, theirs = load_parts(chat_dir), load_hf(directory)
    assert theirs.tokenizer is not None and ours.tokenizer is not None and theirs.template is not None
    ids = torch.tensor([ours.tokenizer.encode("Hello there, 東京")])
    assert torch.equal(ours.model.eval()(ids), theirs.model.eval()(ids))
    assert "exporting" in capsys.readouterr().err
    before = (directory / "model.safetensors").stat()
    again = given(chat_dir)
    assert "exported before" in capsys.readouterr().err
    assert again[1] == str(directory) and (directory / "model.safetensors").stat() == before
    assert option(again, "--served-model-name") == str(chat_dir) and option(again, "--host") == "127.0.0.1"


def test_another_model_under_the_same_name_is_exported_anew(
    given: Callable[..., list[str]], taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = taught
    first = given(save(tmp_path / "m", model, tokenizer))
    assert given(save(tmp_path / "m", model, tokenizer))[1] == first[1], "the same content"
    other = GPT(model.config)
    assert given(save(tmp_path / "m", other, tokenizer))[1] != first[1]
    by_hand = save(tmp_path / "m", model, tokenizer)
    state = files.read_json(by_hand / "state.json")
    keys = []
    for weights in (model, other):
        save(tmp_path / "m", weights, tokenizer)
        state.pop("files", None)
        files.write_json(by_hand / "state.json", state)
        keys.append(vllm.fingerprint(str(by_hand)))
    assert keys[0] != keys[1], "without noted checksums the files themselves count"


@pytest.mark.parametrize(("asked", "said"), [("bf16", "bfloat16"), ("fp32", "float32"), ("auto", "float32")])
def test_the_precision(given: Callable[..., list[str]], chat_dir: Path, asked: str, said: str) -> None:
    arguments = given(chat_dir, f"--dtype={asked}")
    assert option(arguments, "--dtype") == said
    assert json.loads((Path(arguments[1]) / "config.json").read_text())["dtype"] == said


def test_auto_is_bf16_for_models_worth_it(
    given: Callable[..., list[str]], chat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatwright.language_model.WORTH_COMPILING", 1000)
    assert option(given(chat_dir), "--dtype") == "bfloat16"


def test_what_is_in_transformers_format_is_passed_on(
    given: Callable[..., list[str]], hf_dir: Path, folder: Path
) -> None:
    arguments = given(hf_dir)
    assert arguments == [
        "serve",
        str(hf_dir),
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
        "--served-model-name",
        str(hf_dir),
    ]
    assert given("hf:owner/name", "--dtype=fp32", "--name=n")[1:] == [
        "owner/name",
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
        "--served-model-name",
        "n",
        "--dtype",
        "float32",
    ]
    assert not (folder / "cache").exists()


def test_a_gguf_file_is_exported(given: Callable[..., list[str]], chat_dir: Path, tmp_path: Path) -> None:
    from chatwright.commands.export import main as main_export

    assert main_export([str(chat_dir), str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
    arguments = given(tmp_path / "m.gguf")
    assert load_hf(arguments[1]).model.config.vocab_size == load_parts(chat_dir).model.config.vocab_size
    assert given(tmp_path / "m.gguf")[1] == arguments[1]


def test_arguments_of_vllm_come_last(given: Callable[..., list[str]], hf_dir: Path) -> None:
    extra = ["--tensor-parallel-size", "2", "--dtype=half"]
    assert given(hf_dir, "--dtype=fp32", f"--engine_args={json.dumps(extra)}")[-5:] == [
        "--dtype",
        "float32",
        *extra,
    ]


# ---- what is refused ---------------------------------------------------------------------------------------


def test_settings_without_a_counterpart(given: Callable[..., list[str]], hf_dir: Path) -> None:
    for setting in ("--max_requests=3", "--memory_gb=1", '--models=["a=b"]', '--allowed_hosts=["x.org"]'):
        with pytest.raises(UsageError, match=rf"{setting.split('=')[0]} has no counterpart in vLLM"):
            given(hf_dir, setting)
    with pytest.raises(UsageError, match="does not pick a free port"):
        given(hf_dir, "--port=0")
    for dtype in ("int8", "int4", "half"):
        with pytest.raises(UsageError, match="take auto, fp32 or bf16"):
            given(hf_dir, f"--dtype={dtype}")
    with pytest.raises(UsageError, match="--engine_args are for --engine vllm"):
        main([str(hf_dir), '--engine_args=["--x"]'])


def test_no_setting_is_dropped_in_silence() -> None:
    """Every setting of `serve` is either carried or refused, those that will be added included."""
    for field in dataclasses.fields(ServeConfig):
        if field.name in vllm.CARRIED:
            continue
        changed = ServeConfig(engine="vllm")
        object.__setattr__(changed, field.name, "something else")
        with pytest.raises(UsageError, match=f"--{field.name} has no counterpart"):
            vllm.check(changed)


def test_without_vllm_the_remedy_is_named(folder: Path, chat_dir: Path) -> None:
    with pytest.raises(UserError, match="pip install vllm"):
        main([str(chat_dir), "--engine=vllm"])
    assert not (folder / "cache").exists(), "found out before anything is exported"


def test_the_program_beside_this_python_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(folder, RECORDS)
    (folder / "venv").mkdir()
    shutil.copy(folder / "bin" / "vllm", folder / "venv" / "vllm")
    monkeypatch.setattr(vllm.sys, "executable", str(folder / "venv" / "python"))
    assert vllm.find_program() == str(folder / "venv" / "vllm")


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("gpt1", {}, "vLLM has no openai-gpt"),
        ("modern-nano", {"logit_softcap": 5.0}, "cannot be written as hf.*logit_softcap"),
    ],
)
def test_models_that_vllm_cannot_compute(
    given: Callable[..., list[str]],
    taught: tuple[GPT, Tokenizer],
    folder: Path,
    preset: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    small = {"layers": 1, "width": 16, "heads": 2} if preset == "gpt1" else {}
    model = GPT(GPTConfig.preset(preset, vocab_size=taught[1].vocab_size, context=32, **small, **changes))
    with pytest.raises(UserError, match=said):
        given(save(folder / "m", model, taught[1]))
    assert not list((folder / "cache").rglob("*.json"))


def test_names_that_lead_nowhere(given: Callable[..., list[str]], base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        given("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model"):
        given(tmp_path / "empty")
    assert given(base_dir)[0] == "serve", "a base model is served for /v1/completions"


@pytest.mark.parametrize(
    "how", ["--insecure", "VLLM_API_KEY", "CHATWRIGHT_API_KEYS", '--engine_args=["--api-key", "k"]']
)
def test_a_server_open_to_everybody_is_refused(
    given: Callable[..., list[str]], hf_dir: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")  # it is set by what is tested: the old one must come back
    with pytest.raises(UserError, match="everybody who reaches this machine"):
        given(hf_dir, "--host=0.0.0.0")
    if how.startswith("--"):
        assert given(hf_dir, "--host=0.0.0.0", how)
    else:
        monkeypatch.setenv(how, "a-key-of-sixteen-characters")
        assert given(hf_dir, "--host=0.0.0.0")


def test_keys(given: Callable[..., list[str]], hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key goes by the environment, where other people of the machine do not see it; what would be lost is
    refused."""
    monkeypatch.setenv("VLLM_API_KEY", "")
    monkeypatch.setenv("CHATWRIGHT_API_KEYS", " first-key-0123456789, ")
    assert "first-key-0123456789" not in given(hf_dir)
    assert os.environ["VLLM_API_KEY"] == "first-key-0123456789"
    monkeypatch.setenv("VLLM_API_KEY", "another-key-0123456789")
    with pytest.raises(UserError, match="different keys"):
        given(hf_dir)
    monkeypatch.setenv("CHATWRIGHT_API_KEYS", "first-key-0123456789,second-key-0123456789")
    with pytest.raises(UserError, match="holds 2 keys"):
        given(hf_dir)
    with pytest.raises(UsageError, match="--api_keys has no counterpart"):
        given(hf_dir, "--api_keys=keys.txt")


# ---- the program itself ------------------------------------------------------------------------------------


def run_verb(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    program = "import sys; from chatwright.cli import main; sys.exit(main())"
    environment = {**os.environ, "PATH": str(folder / "bin")}
    return subprocess.Popen(
        [PYTHON, "-c", program, "serve", *map(str, arguments), "--engine", "vllm"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_vllm_takes_the_process_over(folder: Path, hf_dir: Path) -> None:
    """The same process (its signals and exit code are vLLM's), the arguments as they are, the environment
    whole."""
    record = stand_in(folder, RECORDS)
    child = run_verb(folder, hf_dir, "--port=8001", '--engine_args=["--api-key", "it\'s 1"]')
    out, err = child.communicate(timeout=60)
    seen = json.loads(record.read_text())
    assert child.returncode == 7 and seen["pid"] == child.pid
    assert seen["argv"][:2] == ["serve", str(hf_dir)] and seen["argv"][-2:] == ["--api-key", "it's 1"]
    assert seen["env"]["CHATWRIGHT_CACHE"] == str(folder / "cache")
    assert out == "the stand-in runs\n" and "Traceback" not in err
    assert "handing over to vLLM" in err and "it's" not in err, "a key must not land in a log"


def test_a_program_that_cannot_be_started(folder: Path, hf_dir: Path) -> None:
    stand_in(folder, "#!/no/such/interpreter")
    child = run_verb(folder, hf_dir)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "vllm cannot be started: No such file" in err and "Traceback" not in err


def test_where_processes_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str]) -> int:
        calls.append(command)
        return 3

    monkeypatch.setattr(vllm.os, "name", "nt")
    monkeypatch.setattr(vllm.subprocess, "call", call)
    code = vllm.become("vllm", ["serve", "x"])
    monkeypatch.undo()
    assert code == 3 and calls == [["vllm", "serve", "x"]]


def test_a_stand_in_that_really_serves(folder: Path, chat_dir: Path) -> None:
    """The whole way: our model, exported, and a server that answers under the name that was asked for."""
    stand_in(folder, SERVES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = run_verb(folder, chat_dir, f"--port={port}", "--name=mine")
    try:
        response = wait_until(lambda: reached(f"http://127.0.0.1:{port}/v1/models"), process=child)
        found = response.json()
        assert found["data"][0]["id"] == "mine" and found["data"][0]["root"].startswith(
            str(folder / "cache" / "vllm")
        )
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == -signal.SIGTERM, "signals reach the program itself"
    finally:
        child.kill()
        child.communicate()
