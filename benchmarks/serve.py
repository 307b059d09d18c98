"""A real `chatwright serve` under the load of many clients: nothing lost, nothing mixed up, nobody starved,
memory flat.

    make bench-serve                                   # 64 clients, five minutes, SmolLM2 in int8; then the
                                                       # checking
    python benchmarks/serve.py --seconds 20            # to see that it works; too short for memory, and
                                                       # nothing is written
    python benchmarks/serve.py --dtype bf16 --clients 32

First each of 48 questions is asked alone; then `--clients` ask them at random, all greedy. A fifth of the
requests is left in the middle, three clients read slowly, four sockets send half a request and fall silent,
all the time. Completions must be those given alone. Where one is not, it must be a greedy answer up to near
ties (load_judge.py), which are counted apart; with any other difference, a lost answer, a starved client or
growing memory the exit code is 1. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import side_by_side
from load_clients import Load, Question, Reply, Target, alone
from load_judge import LONG_ENOUGH, Oracle, Verdict, growth_of, judge

NAME = "model-under-load"
TASKS = (
    "Write a short story about a lighthouse.",
    "What is 12 times 7?",
    "Name three animals that live in the sea.",
    "Explain in simple words why the sky is blue.",
    "Translate 'good morning' into French.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "List the planets of the solar system.",
    "Write a poem of four lines about rain.",
    "What should I pack for a week in the mountains?",
    "How do plants make sugar?",
    "Say hello.",
)
PASSAGE = (
    "The history of the city begins with a small settlement on the northern bank of the river, where traders "
    "met in spring and autumn. A wooden bridge was built, burnt down twice, and was built again in stone. "
    "Around it grew a market, then walls, and at last a university, whose students were feared for their "
    "songs. "
)
LENGTHS = ((0, 96), (1, 24), (3, 64), (8, 16))
"""Times that the passage stands before the task, and tokens of the answer."""


def questions() -> list[Question]:
    """48 questions, prompts of some 35 to 700 tokens, answers of up to 16 to 96."""
    return [
        Question(f"{PASSAGE * times}{task}", tokens + 7 * (number % 3))
        for times, tokens in LENGTHS
        for number, task in enumerate(TASKS)
    ]


@contextlib.contextmanager
def running_server(model: str, dtype: str) -> Iterator[tuple[Target, subprocess.Popen[str]]]:
    """`chatwright serve` in a process of its own. Raises SystemExit with its messages when it does not come
    up."""
    command = [
        sys.executable,
        "-m",
        "chatwright.cli",
        "serve",
        model,
        "--port=0",
        "--store=none",
        f"--name={NAME}",
        f"--dtype={dtype}",
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    try:
        assert child.stderr is not None
        found = None
        for line in child.stderr:
            said.append(line)
            found = re.search(r"http://([\d.]+):(\d+)/v1", line)
            if found:
                break
        if not found:
            raise SystemExit(f"the server did not start:\n{''.join(said)}")
        threading.Thread(
            target=lambda: said.extend(child.stderr or ()), daemon=True
        ).start()  # or its pipe would fill up
        yield Target(found[1], int(found[2]), NAME), child
        if child.poll() is not None:
            raise SystemExit(
                f"the server ended by itself, exit code {child.returncode}:\n{''.join(said)[-3000:]}"
            )
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    import psutil

    return int(psutil.Process(pid).memory_info().rss)


async def watched(load: Load, seconds: float, pid: int) -> list[tuple[float, float]]:
    """Run the load; the server's memory, every second; a line of progress every five."""
    memory: list[tuple[float, float]] = []
    begun = time.perf_counter()
    work = asyncio.create_task(load.run(seconds))
    while not work.done():
        at = time.perf_counter() - begun
        memory.append((at, resident(pid)))
        if len(memory) % 5 == 1:
            tell(progress(load, seconds - at, memory[-1][1]))
        await asyncio.wait({work}, timeout=1)
    await work
    return memory


def progress(load: Load, left: float, size: float) -> str:
    """One line."""
    ended = [reply for reply in load.replies if not reply.error]
    whole = sum(reply.finish is not None for reply in ended)
    lost, refused = len(load.replies) - len(ended), sum(reply.refused for reply in load.replies)
    clock = f"{int(left) // 60}:{int(left) % 60:02} left" if left > 0 else "everybody ends"
    return (
        f"{clock}: {whole} answers, {len(ended) - whole} left early, {lost} lost, {refused} x 429, "
        f"{size / 1e6:,.0f} MB"
    )


def tell(text: str) -> None:
    """A line that replaces the one before on a terminal."""
    print(
        f"\r\x1b[K  {text}" if sys.stdout.isatty() else f"  {text}",
        end="" if sys.stdout.isatty() else "\n",
        flush=True,
    )


def table(verdict: Verdict, memory: list[tuple[float, float]], title: str) -> str:
    """The figures as Markdown, for README.md and docs."""
    one, growth = verdict.figures, growth_of(memory)
    rows = {
        "answers equal to those given alone": verdict.counts.get("answers equal", 0),
        "answers that part at a near tie (widest, nats)": (
            f"{verdict.counts.get('answers near tie', 0)} ({verdict.widest_tie:.3f})"
        ),
        "wrong, lost": f"{verdict.counts.get('answers wrong', 0)}, {verdict.counts.get('answers lost', 0)}",
        "left in the middle; half requests; 429": f"{verdict.counts.get('requests leaves', 0)}; "
        f"{verdict.counts['half requests']}; {verdict.counts['status 429']}",
        "tokens/s; one client alone": f"{one['tokens_per_second']:.0f}; {one['tokens_per_second_alone']:.0f}",
        "first token, p50, p95, longest (s)": (
            f"{one['first_token_p50']:.2f}, {one['first_token_p95']:.2f}, {one['first_token_max']:.2f}"
        ),
        "between tokens, p50, p95 (ms)": (
            f"{1000 * one['between_tokens_p50']:.0f}, {1000 * one['between_tokens_p95']:.0f}"
        ),
        "memory at the end; growth over the second half (MB)": (
            f"{growth[1] / 1e6:,.0f}; {growth[0] / 1e6:+.1f}"
        ),
    }
    return "\n".join(
        [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def write(
    options: argparse.Namespace, verdict: Verdict, load: Load, known: list[Reply], memory: list[Any]
) -> Path:
    """results/serve.json."""
    one, key = verdict.figures, f"{Path(options.model).name}/{options.dtype}/{options.clients}_clients"
    ratios = {
        f"{key}/tokens_over_alone": one["tokens_per_second"] / one["tokens_per_second_alone"],
        f"{key}/longest_wait_over_median": one["first_token_max"] / one["first_token_p50"],
        f"{key}/growth_over_memory": growth_of(memory)[0] / growth_of(memory)[1],
    }
    samples = {
        **asdict(verdict),
        "memory": [(round(at, 1), int(size)) for at, size in memory],
        "first_token_seconds": [round(reply.first, 3) for reply in load.replies if reply.first is not None],
        "finished_per_client": [
            sum(reply.client == number and reply.finish is not None for reply in load.replies)
            for number in range(load.clients)
        ],
        "alone": [
            {"question": reply.question, "tokens": reply.tokens, "text": reply.text} for reply in known
        ],
    }
    command = "python benchmarks/serve.py " + " ".join(sys.argv[1:])
    return side_by_side.write_results(
        "serve", ratios, command, ["numba", "uvicorn", "fastapi"], {key: samples}
    )


def main() -> int:
    """Start, ask alone, load, stop, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what `chatwright serve` takes")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asked = questions()
    print(f"starting chatwright serve {options.model} --dtype {options.dtype}", flush=True)
    with running_server(options.model, options.dtype) as (target, child):
        known = asyncio.run(alone(target, asked, tell))
        print(f"\n{options.clients} clients for {options.seconds:.0f} seconds", flush=True)
        load = Load(target, asked, clients=options.clients, seed=options.seed)
        memory = asyncio.run(watched(load, options.seconds, child.pid))
    print("\nthe server is stopped; answers that differ are walked through the model", flush=True)
    from chatwright.language_model import load as load_model

    verdict = judge(load, known, Oracle(load_model(options.model, dtype=options.dtype), asked), memory)
    print(
        table(
            verdict,
            memory,
            f"{Path(options.model).name}, {options.dtype}, {options.clients} clients, "
            f"{options.seconds:.0f} s",
        )
    )
    print(verdict.counts)
    for failure in verdict.failures[:20]:
        print(f"FAILED  {failure}")
    if options.seconds < LONG_ENOUGH:
        print(f"memory was not judged and nothing is written: that takes {LONG_ENOUGH:.0f} seconds or more")
    else:
        print(f"{write(options, verdict, load, known, memory)} written")
    print("every check holds" if verdict.passed else f"{len(verdict.failures)} failures")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
