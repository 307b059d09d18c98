"""Every command of docs/guide/, in the order of the page, on a miniature of what its reader has.

Commands stand in blocks marked `sh`. They run as they stand, but for sizes: options that make training short
are added, SmolLM2 is a model of a few thousand parameters, and the recipe's data, which come over the
network, are files of the same kinds. A comment before a block leaves it out (`<!-- not run: why -->`) or to
the slow tests (`<!-- slow -->`); what is left out is a skipped test that says why.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest

from chatwright import cli

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for (\w+) in ([^;\n]+); do\n(.*?)^done$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("chatwright", "torchrun", "python", "make", "curl", "pip", "vllm", "llama-server", "ollama", "ls")

FIT = "--fit.seconds 0 --fit.steps 2 --fit.batch_size 2 --fit.compile false"
ROLLOUTS = "--max_prompt_tokens 40 --max_new_tokens 8 --min_tokens 1 --min_correlation -1"
POLICY = f"{ROLLOUTS} --iterations 1 --batch_size 4 --minibatch_size 2"
DATA = "--data.dialogues mine.jsonl --data.ratings rated.jsonl --data.ratings_validation 0.4"
SHAPE = '{"context": 64, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 64}'


def of_stage(name: str, options: str) -> str:
    """Options of a stage as a recipe's command line has them."""
    return re.sub(r"--(\w)", rf"--{name}.\1", options)


OWN = " ".join(
    (
        "--sft.base small",
        of_stage("sft", f"{FIT} --held_out 2 --fit.evaluate_every 1"),
        of_stage("reward", f"{FIT} --fit.evaluate_every 1").replace("--reward.fit.batch_size 2", ""),
        of_stage("ppo", POLICY),
        of_stage("evaluate", "--prompts 4 --max_prompt_tokens 40 --max_new_tokens 8"),
    )
)
"""What is added to `run own`, whose stages are others than those of the quickstart's recipe."""

SIZES = {
    "pretrain": f"{FIT} --model '{SHAPE}'",
    "sft": f"{FIT} --held_out 2",
    "reward": f"{FIT} --k 2 --max_tokens 40",
    "classifier": f"{FIT} --max_tokens 40",
    "ppo": POLICY,
    "reinforce": POLICY,
    "best_of_n": f"{ROLLOUTS} --prompts 4 --n 2",
    "plan": "--time false",
    "run": " ".join(
        (
            f"{DATA} --tokenizer.vocab_size 300 --pretrain.preset modern-nano --pretrain.model.context 64",
            of_stage("pretrain", FIT),
            of_stage("sft", f"{FIT} --held_out 2"),
            of_stage("reward", f"{FIT} --micro_batch 0 --k 2 --max_tokens 40").replace("micro", "fit.micro"),
            of_stage("ppo", POLICY),
            of_stage("eval", "--prompts 4 --max_prompt_tokens 40 --max_new_tokens 8"),
        )
    ),
}
"""What is added to a command of each verb. `--min_correlation -1`: after two steps no reward model is any
good, and PPO would refuse it."""


@dataclass(frozen=True)
class Block:
    """A block of commands of a page."""

    page: Path
    number: int
    mark: str
    """What the comment before it says; empty for none."""
    text: str

    @property
    def commands(self) -> list[str]:
        """One command each, loops written out, lines that go on joined."""

        def unrolled(loop: re.Match[str]) -> str:
            name, values, body = loop.groups()
            return "".join(body.replace(f"${name}", value) for value in values.split())

        text = LOOP.sub(unrolled, self.text).replace("\\\n", " ")
        return [line.strip() for line in text.splitlines() if line.strip()]


@cache
def blocks(page: Path) -> list[Block]:
    """The blocks of commands of a page."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    texts = [(one[1] or "", one[3]) for one in found if one[2] == "sh"]
    return [Block(page, number, mark, text) for number, (mark, text) in enumerate(texts, 1)]


LEFT_OUT = [block for page in PAGES for block in blocks(page) if block.mark.startswith("not run")]
SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks(page))]


# ---- what the reader has -----------------------------------------------------------------------------------


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, chat_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: texts/, mine.jsonl, pairs.jsonl, rated.jsonl, and a finished run, runs/tiny."""
    text = "\n\n".join(f"The house number {n} is old and {'red' if n % 2 else 'blue'}." for n in range(4000))
    (tmp_path / "texts").mkdir()
    for n in range(60):
        (tmp_path / "texts" / f"{n}.txt").write_text(text[n * 2000 : (n + 1) * 2000], encoding="utf-8")
    talks = [("user", "Say {}"), ("assistant", "{}!")]
    write_lines(
        tmp_path / "mine.jsonl",
        [
            {"messages": [{"role": role, "content": said.format(n)} for role, said in talks]}
            for n in range(300)
        ],
    )
    write_lines(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(300)],
    )
    moods = (("good", 2.0), ("bad", -2.0))
    write_lines(
        tmp_path / "rated.jsonl",
        [{"text": f"{moods[n % 2][0]} {n}", "label": moods[n % 2][1] + n / 1500} for n in range(1500)],
    )
    for stage in ("sft", "reward"):
        shutil.copytree(chat_dir, tmp_path / "runs/tiny" / stage / "checkpoints/step-000001")
    shutil.copytree(chat_dir, tmp_path / "small")
    write_result(tmp_path / "runs/tiny/sft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATWRIGHT_DATA", str(tmp_path / "kept"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def write_result(stage: Path) -> None:
    result = {"fingerprint": "0" * 16, "model": "checkpoints/step-000001", "measures": []}
    (stage / "result.json").write_text(json.dumps(result), encoding="utf-8")


# ---- how it runs -------------------------------------------------------------------------------------------


class Reader:
    """Somebody who types a page's commands one after the other, in a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.server: subprocess.Popen[bytes] | None = None
        self.port = 0

    def type(self, command: str) -> None:
        """Run a command; it must end well."""
        words = shlex.split(command.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}"), comments=True)
        words = ["small" if word == "smollm2" else word for word in words]
        if words[:2] == ["chatwright", "serve"]:
            self.serve(words[1:])
        elif words[0] == "chatwright":
            more = shlex.split(OWN if words[1:3] == ["run", "own"] else SIZES.get(words[1], ""))
            if words[1:3] == ["run", "tiny"] and "--data.path" not in words:
                more += ["--data.path", "texts"]
            self.patch.setattr(sys, "stdin", io.StringIO("Hi!\n"))
            assert cli.main([*words[1:], *more]) == 0, command
        else:
            self.start(words, command)

    def start(self, words: list[str], command: str) -> None:
        """Another program, `torchrun` with the options of the verb that it starts."""
        if words[0] == "torchrun":
            verb = words[words.index("chatwright") + 1]
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *shlex.split(SIZES[verb])]
        assert shutil.which(words[0]), f"{words[0]} is not installed here"
        done = subprocess.run(words, env=environment(), capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout.decode()}{done.stderr.decode()}"
        if words[0] == "curl":
            assert "error" not in json.loads(done.stdout), done.stdout

    def serve(self, words: list[str]) -> None:
        """Start a server and wait until it answers; the one before is ended."""
        self.end()
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = int(one.getsockname()[1])
        command = [sys.executable, "-m", "chatwright", *words, "--port", str(self.port)]
        self.server = subprocess.Popen(command, env=environment())
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.server.poll() is None, words
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/ready", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready: {words}")

    def end(self) -> None:
        """End the server, if there is one: in peace, and with exit code 0."""
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            self.server = None


def environment() -> dict[str, str]:
    """Programs that are started find this checkout first."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in the folder; a server that is left is ended."""
    one = Reader(monkeypatch)
    yield one
    one.end()


def run_page(page: Path, reader: Reader, *, slow: bool) -> None:
    for block in blocks(page):
        if not block.mark or (slow and block.mark == "slow"):
            for command in block.commands:
                before = time.process_time()
                reader.type(command)
                print(f"{time.process_time() - before:.1f} s of processor time: {command}")


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not block.mark for block in blocks(page))],
    ids=lambda page: page.stem,
)
def test_the_commands_of_the_page_work(page: Path, reader: Reader) -> None:
    run_page(page, reader, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.stem)
def test_the_long_commands_of_the_page_work(page: Path, reader: Reader) -> None:
    run_page(page, reader, slow=True)


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: f"{block.page.stem}-{block.number}")
def test_what_is_left_out_says_why(block: Block) -> None:
    reason = block.mark.partition(": ")[2]
    assert len(reason) > 5, f"{block.page.name}: write <!-- not run: why --> before block {block.number}"
    pytest.skip(f"NOT RUN, docs/guide/{block.page.name}: {reason}: {block.commands[0]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_hides_in_another_block(page: Path) -> None:
    for mark, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert mark in ("", "slow") or mark.startswith("not run") or language != "sh", mark
        if language != "sh":
            first = [line.split()[0] for line in text.splitlines() if line.strip()]
            assert not set(first) & set(PROGRAMS), f"{page.name}: a command outside of an `sh` block:\n{text}"


# ---- messages ----------------------------------------------------------------------------------------------


@cache
def texts_of_the_package() -> list[str]:
    """Every text in the source, f-strings with their gaps."""
    found = []
    for file in (ROOT / "chatwright").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str) -> bool:
    """Whether a text of the program has all pieces of a message, in order. `...`, M and N mean anything."""
    pieces = [re.escape(piece.strip()) for piece in re.split(r"\.\.\.|\b[MN]\b|\b8000\b|'\w+'", message)]
    pattern = re.compile(".*".join(piece for piece in pieces if piece), re.DOTALL)
    return any(pattern.search(text) for text in texts_of_the_package())


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    page = (GUIDE / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [
        line.split(" | ")[0] for line in page.partition("## Messages")[2].splitlines() if line[:3] == "| `"
    ]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 20
    assert [message for message in messages if not is_said(message)] == []
    assert is_said("no data source given") and not is_said("no data source was given")
