"""Scoring given texts: forty short ones sent to `chatwright serve`, as lm-eval sends them, beside
transformers in its own process.

    python benchmarks/score.py                  # two minutes

Each text is scored once a round: ids, `echo`, `logprobs` 1, `max_tokens` 1. `server:clients` sends one text a
request from forty clients at once, `server:batch` forty in one request, `server:one-by-one` one request after
the other. `transformers:batch` and `transformers:one-by-one` do what lm-eval's `hf` model does with the same
texts: a padded pass (of all, of one), log_softmax, the texts' tokens and whether they are the likeliest.
Server and client share the processors. All are float32. The numbers are compared before the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import side_by_side
import torch

from chatwright.generate.scoring import ToScore, score_texts
from chatwright.language_model import load

TEXTS = 40
LENGTHS = range(16, 36)
"""Tokens of the texts."""
QUESTION = "Question number {}: which of the towns of the north has more rain in autumn than {}? Answer: "
NAMES = (
    "server:clients",
    "server:batch",
    "server:one-by-one",
    "transformers:batch",
    "transformers:one-by-one",
)
PAIRS = {
    "clients": ("server:clients", "transformers:batch"),
    "batch": ("server:batch", "transformers:batch"),
    "one-by-one": ("server:one-by-one", "transformers:one-by-one"),
}
"""Name of a ratio -> which times are divided."""


def texts(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Forty texts of different lengths."""
    made = []
    for number in range(TEXTS):
        ids = encode(QUESTION.format(number, ("Bergen", "Oslo", "Tromsø")[number % 3]) * 3)
        made.append(ids[: LENGTHS[number % len(LENGTHS)]])
    return made


@contextlib.contextmanager
def serving(source: str) -> Iterator[str]:
    """A real server in a process of its own; its address."""
    command = [sys.executable, "-m", "chatwright", "serve", source, "--port", "8797", "--store", "none"]
    url = "http://127.0.0.1:8797"
    with subprocess.Popen([*command, "--name", "m", "--dtype", "fp32"], stdout=subprocess.DEVNULL) as child:
        try:
            while True:
                if child.poll() is not None:
                    raise SystemExit("the server ended; see its messages above")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                time.sleep(0.2)
            yield url
        finally:
            child.terminate()


async def ask(url: str, groups: Sequence[Sequence[list[int]]], together: bool) -> list[list[float]]:
    """Log-probabilities of the texts; each group is a request."""

    async def one(client: httpx.AsyncClient, prompts: Sequence[list[int]]) -> list[list[float]]:
        body = {"model": "m", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = await client.post(f"{url}/v1/completions", json={**body, "temperature": 0, "seed": 1234})
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return [choice["logprobs"]["token_logprobs"][1:-1] for choice in choices]

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=TEXTS)) as client:
        if together:
            found = await asyncio.gather(*(one(client, group) for group in groups))
        else:
            found = [await one(client, group) for group in groups]
    return [text for group in found for text in group]


def of_server(url: str, kind: str, ids: Sequence[list[int]]) -> list[list[float]]:
    """The server's numbers."""
    groups: list[list[list[int]]] = [list(ids)] if kind == "batch" else [[one] for one in ids]
    return asyncio.run(ask(url, groups, kind == "clients"))


def of_transformers(model: Any, kind: str, ids: Sequence[list[int]]) -> list[list[float]]:
    """transformers' numbers, as lm-eval takes them out of its logits."""
    groups: list[list[list[int]]] = [list(ids)] if kind == "batch" else [[one] for one in ids]
    found = []
    for group in groups:
        longest = max(map(len, group))
        rows = torch.tensor([[*one, *[0] * (longest - len(one))] for one in group])
        with torch.no_grad():
            logprobs = model(rows).logits.log_softmax(-1)
        for one, row in zip(group, logprobs, strict=True):
            wanted = torch.tensor(one[1:])
            part = row[: len(wanted)]
            bool((part.argmax(-1) == wanted).all())
            found.append(part.gather(1, wanted[:, None])[:, 0].tolist())
    return found


def contender(name: str, ids: Sequence[list[int]], url: str, exported: str) -> side_by_side.Contender:
    """A contender of side_by_side.py."""
    side, _, kind = name.partition(":")

    def prepare() -> Callable[[], float]:
        if side == "server":
            work: Callable[[], object] = lambda: of_server(url, kind, ids)  # noqa: E731
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
            work = lambda: of_transformers(model, kind, ids)  # noqa: E731
        work()

        def one_round() -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        return one_round

    return prepare


def check(source: str, ids: Sequence[list[int]], url: str, exported: str) -> float:
    """The largest difference between any two of: the server, transformers, `score_texts`."""
    from transformers import AutoModelForCausalLM

    model = load(source)
    own = [
        [value for _, value, _ in scored.tokens[1:] if value is not None]
        for scored in score_texts(model.model, [ToScore(one) for one in ids])
    ]
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    others = [of_server(url, "clients", ids), of_transformers(theirs, "batch", ids)]
    return max(
        abs(a - b)
        for other in others
        for mine, text in zip(own, other, strict=True)
        for a, b in zip(mine, text, strict=True)
    )


def main() -> int:
    """In turns, the table, results/score.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model's name or path")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shared = Path(tempfile.gettempdir()) / "chatwright-score.json"
    if options.contender:
        given = json.loads(shared.read_text(encoding="utf-8"))
        return side_by_side.serve_rounds(contender(options.contender, **given))
    model = load(options.model)
    ids = texts(model.tokenizer.encode)
    with tempfile.TemporaryDirectory() as scratch, serving(options.model) as url:
        exported = str(Path(scratch) / "hf")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "chatwright",
                "export",
                "--format",
                "hf",
                options.model,
                exported,
                "--dtype",
                "fp32",
            ],
            check=True,
        )
        shared.write_text(json.dumps({"ids": ids, "url": url, "exported": exported}), encoding="utf-8")
        print(f"largest difference: {check(options.model, ids, url, exported):.1e} nats")
        samples = side_by_side.run_iterations(__file__, options.contenders, options.rounds)
    ratios = {
        name: side_by_side.median_ratio(samples[ours]["seconds"], samples[theirs]["seconds"])
        for name, (ours, theirs) in PAIRS.items()
        if ours in samples and theirs in samples
    }
    for name, ratio in ratios.items():
        print(f"{name}: {1 / ratio:.2f} times transformers' time")
    print(side_by_side.write_results("score", ratios, " ".join(sys.argv), ["transformers"], samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
