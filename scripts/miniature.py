"""A miniature of all that chatwright computes, run with the code of any checkout: for same_results.py.

Data, seed, threads, precision and all paths are fixed, so two codes that compute the same write the same
files. Every command is a process of its own, as a user starts it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

RECIPE = """\
# Written with the names of settings that 3efff8f had, so that reading these names is proven too.
# Stages have a length in steps, and the clock writes no checkpoint: a run in seconds never repeats exactly.
name: mini
seed: 7
prompt: How is the cat number 5?
stages:
  data: {text: ../inputs/text, dialogues: ../inputs/dialogues.jsonl, ratings: ../inputs/ratings.jsonl,
         comparisons: ../inputs/comparisons.jsonl, validation: 0.2, ratings_validation: 0.2}
  tokenizer: {vocab_size: 400}
  pretrain:
    preset: modern-nano
    model: {context: 64}
    fit: {steps: 120, batch_size: 8, compile: false, precision: fp32, evaluate_every: 40, save_every: 1.0e6,
          save_steps: 50}
  pretrain-gpt1:           # norms after the blocks, learned positions, accumulation, activations recomputed
    use: pretrain
    preset: gpt1
    model: {context: 64, layers: 2, width: 32, heads: 2, mlp_width: 128}
    fit: {steps: 6, batch_size: 8, micro_batch: 4, compile: false, precision: fp32, recompute: true,
          log_every: 2, save_every: 1.0e6}
  pretrain-gpt2:           # normalisation before the block, AdamW alone, a cosine, bf16 products
    use: pretrain
    preset: gpt2
    model: {context: 64, layers: 2, width: 32, heads: 2, mlp_width: 128}
    fit: {steps: 6, batch_size: 8, compile: false, precision: bf16, log_every: 2, save_every: 1.0e6}
    optim: {name: adamw, learning_rate: 0.001, schedule: cosine, final: 0.1}
  sft:
    context: 64
    fit: {steps: 120, batch_size: 8, precision: fp32, save_every: 1.0e6, save_steps: 50}
    optim: {learning_rate: 0.004}
  sft-lora:
    use: sft
    context: 64
    packing: false
    lora: {rank: 4, dropout: 0.1}
    fit: {steps: 20, batch_size: 8, precision: fp32, save_every: 1.0e6, save_steps: 10}
    optim: {learning_rate: 0.004}
  reward:
    k: 4
    max_tokens: 48
    margin: 0.5
    lead: 0.1
    fit: {steps: 80, batch_size: 4, precision: fp32, save_every: 1.0e6, save_steps: 50}
    optim: {learning_rate: 0.002}
  reward-comparisons:
    use: reward
    comparisons: data
    k: 16
    ties: half
    held_out_annotators: anna
    max_tokens: 48
    lora: {rank: 8}
    fit: {steps: 60, batch_size: 8, precision: fp32, save_every: 1.0e6}
    optim: {learning_rate: 0.01}
  classifier:
    max_tokens: 48
    fit: {steps: 30, batch_size: 16, precision: fp32, save_every: 1.0e6}
    optim: {learning_rate: 0.002}
  ppo: &rounds
    iterations: 5
    batch_size: 16
    minibatch_size: 8
    max_prompt_tokens: 40
    max_new_tokens: 18
    min_tokens: 1
    min_correlation: -1
    min_distinct: 0
    save_every: 2
    precision: fp32
    optim: {learning_rate: 0.0005}
  ppo-lora: {<<: *rounds, use: ppo, iterations: 3, lora: {rank: 4}, average: 0.9}
  ppo-shared:              # one body with the critic, loss on general text, a gold measure, averaged weights
    <<: *rounds
    use: ppo
    iterations: 3
    critic: shared
    epochs: 2
    whiten_rewards: true
    text: tokenizer
    ptx: 0.5
    ptx_windows: 1
    ptx_context: 32
    gold: sentiment
    average: 0.9
    entropy_coefficient: 0.01
    temperature: 0.9
  ppo-classifier: {<<: *rounds, use: ppo, iterations: 2, reward: classifier, gold: reward}
  reinforce: {<<: *rounds, use: reinforce, iterations: 3, baseline: leave-one-out, samples_per_prompt: 2}
  bestofn: {prompts: 12, n: 4, max_prompt_tokens: 40, max_new_tokens: 18, min_tokens: 1, min_correlation: -1,
            rival: ppo}
  eval: {prompts: 24, samples: 1, max_prompt_tokens: 40, max_new_tokens: 18}
"""

STAGES = len(yaml.safe_load(RECIPE)["stages"])

USES = {
    "export-hf": ("export runs/mini/ppo uses/hf --format hf", ""),
    "export-gpt1": ("export runs/mini/pretrain-gpt1 uses/gpt1 --format hf --dtype bf16", ""),
    "export-f32": ("export runs/mini/ppo uses/f32.gguf --format gguf --dtype f32", ""),
    "export-q8_0": ("export runs/mini/ppo uses/q8_0.gguf --format gguf --dtype q8_0", ""),
    "export-lora": (
        "export runs/mini/sft+runs/mini/ppo-lora/adapter uses/lora.gguf --format gguf --dtype bf16",
        "",
    ),
    "import": ("import uses/hf uses/back", ""),
    "generate.txt": (
        "generate runs/mini/pretrain --seed 3 --count 2 --top_p 0.9 --max_new_tokens 12",
        "The old cat",
    ),
    "beams.txt": ("generate runs/mini/pretrain-gpt2 --beams 3 --count 2 --max_new_tokens 8", "The old cat"),
    "int8.txt": ("generate runs/mini/ppo-lora --seed 4 --dtype int8 --max_new_tokens 12", "The old cat"),
    "chat.txt": (
        "chat runs/mini --seed 5 --max_new_tokens 20",
        "How is the river number 3?\nHow is the cat?\n",
    ),
    "compare.json": ("compare runs/mini/ppo runs/mini/reinforce --json", ""),
}
"""What a finished run is used for: arguments and standard input. A name with a suffix is the output file."""

READ = ("export-hf", "export-lora", "generate.txt", "chat.txt", "compare.json")
"""Those that are enough to see that a run of another version is read; the server is asked in any case."""

NAMES = ("anna", "ben", "cleo")
SAMPLED = {"max_tokens": 16, "temperature": 0.9, "seed": 11}


def in_short() -> str:
    """What results depend on here, without comments: two runs can be compared when this was the same."""
    return json.dumps([yaml.safe_load(RECIPE), USES, SAMPLED])


def write_inputs(folder: Path) -> None:
    """The recipe and its data, from the made-up English of the tests. Does nothing when they are there."""
    if (folder / "mini.yaml").exists():
        return
    (source,) = (Path(__file__).resolve().parents[1] / "tests").rglob("babble.py")
    spec = importlib.util.spec_from_file_location("babble", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draw = module.Babble(3)
    comparisons = []
    for number in range(240):
        rated = sorted((draw.rated() for _ in range(3)), key=lambda one: -one[1])
        row: dict[str, Any] = {"prompt": f"Say something, number {number}.", "annotator": NAMES[number % 3]}
        if number % 2:
            row |= {"chosen": rated[0][0], "rejected": rated[-1][0]}
        else:
            row |= {"responses": [text for text, _ in rated], "scores": [label for _, label in rated]}
        comparisons.append(row)
    files = {
        "text/documents.jsonl": _lines([{"text": draw.document()} for _ in range(200)]),
        "text/book.txt": "\n\n".join(draw.document(20) for _ in range(40)),
        "dialogues.jsonl": _lines([{"messages": draw.messages()} for _ in range(240)]),
        "ratings.jsonl": _lines(
            [dict(zip(("text", "label"), draw.rated(), strict=True)) for _ in range(400)]
        ),
        "comparisons.jsonl": _lines(comparisons),
        "mini.yaml": RECIPE,  # the last one: it says that all are there
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


class Failed(Exception):
    """A command did not end well; the text says which, and where its output is."""


@dataclass(frozen=True)
class Side:
    """The code of a checkout, and the folder in which it works; the folder's parent has `inputs`."""

    code: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """One thread, no bf16 by itself, nothing from the network or from the user's own settings."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("CHATWRIGHT_")}
        return plain | {
            "PYTHONPATH": str(self.code),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CHATWRIGHT_BF16": "0",
            "CHATWRIGHT_CACHE": str(self.folder.parent / "cache"),
            "CHATWRIGHT_DATA": str(self.folder / "data"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
            "PYTHONIOENCODING": "utf-8",
        }

    def check(self) -> None:
        """Raise Failed when another installation of chatwright would be run than the checkout's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-c", "import chatwright; print(chatwright.__file__)"]
        found = subprocess.run(argv, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_relative_to(self.code):
            raise Failed(f"{self.code}: python imports {found.stdout or found.stderr}, not this checkout")

    def command(self, name: str, arguments: str, given: str = "") -> str:
        """Run a command of chatwright; what it printed. Raises Failed."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "chatwright", *arguments.split()]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, input=given, capture_output=True, encoding="utf-8"
        )
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            why = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            raise Failed(f"chatwright {arguments}: exit code {done.returncode}: {why} (all of it: {log})")
        return done.stdout

    def walk_the_road(self) -> str:
        """Run the recipe; what it printed."""
        return self.command("run", "run ../inputs/mini.yaml --out runs")

    def use(self, names: Sequence[str] = tuple(USES)) -> None:
        """Export, import, generate, chat, compare and serve what `walk_the_road` made; results in `uses`."""
        uses = self.folder / "uses"
        uses.mkdir(parents=True)
        for name in names:
            arguments, given = USES[name]
            told = self.command(name, arguments, given)
            if "." in name:
                (uses / name).write_text(told, encoding="utf-8")
        with self.served("runs/mini", "--store", "none", "--models", '["base=runs/mini/pretrain"]') as client:
            (uses / "served.json").write_text(json.dumps(conversation(client), indent=1), encoding="utf-8")

    @contextmanager
    def served(self, *arguments: str) -> Iterator[httpx.Client]:
        """A client of `chatwright serve`, which is then stopped. Raises Failed: no clean start or stop."""
        log = self.folder / "logs" / "serve.log"
        argv = [sys.executable, "-m", "chatwright", "serve", *arguments, "--port", "0"]
        with log.open("w", encoding="utf-8") as errors:
            server = subprocess.Popen(
                argv, cwd=self.folder, env=self.environment, stdout=errors, stderr=errors
            )
        try:
            with httpx.Client(base_url=_address(server, log), timeout=60, trust_env=False) as client:
                yield client
            server.send_signal(signal.SIGINT)
            if server.wait(60):
                raise Failed(f"chatwright serve: exit code {server.returncode}; see {log}")
        finally:
            server.kill()
            server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8")):
            return found.group()
        time.sleep(0.05)
    raise Failed(f"chatwright serve did not start; see {log}")


def conversation(client: httpx.Client) -> dict[str, Any]:
    """What a server answers: two turns and completions, some as streams, log-probabilities, its models."""

    def ask(path: str, **body: Any) -> Any:
        answer = client.post(path, json={**SAMPLED, "model": "runs/mini", **body})
        if answer.status_code != 200:
            raise Failed(f"POST {path}: status {answer.status_code}: {answer.text}")
        return answer.json() if not body.get("stream") else _joined(answer.text)

    chat = "/v1/chat/completions"
    messages = [{"role": "user", "content": "How is the cat number 5?"}]
    first = ask(chat, messages=messages, logprobs=True, top_logprobs=2)
    messages.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    messages.append({"role": "user", "content": "How is the river number 3?"})
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "models": client.get("/v1/models").json(),
        "first turn": first,
        "second turn": ask(chat, messages=messages),
        "second turn, streamed": ask(chat, messages=messages, **options),
        "completion": ask("/v1/completions", model="base", prompt="The old cat", logprobs=2, n=2),
        "completion, streamed": ask("/v1/completions", model="base", prompt="The old cat", stream=True),
    }


def _joined(stream: str) -> dict[str, Any]:
    """A stream's text, why it ended, and its usage. How it is cut into events depends on the clock."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [one["choices"][0] for one in events if one["choices"]]
    return {
        "text": "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in choices),
        "reasons": [one["finish_reason"] for one in choices if one["finish_reason"]],
        "usage": [one["usage"] for one in events if one.get("usage")],
        "ended": stream.rstrip().endswith("data: [DONE]"),
    }
