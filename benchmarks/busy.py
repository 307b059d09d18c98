"""Speed beside other programs: what is left of it when busy loops want the processors too.

    python benchmarks/busy.py                            everything, about 15 minutes
    python benchmarks/busy.py --only pretrain            some of the measures
    python benchmarks/busy.py --spin now old             also as OpenMP's threads wait by themselves
    python benchmarks/busy.py --alone --spin now old     that alone, beside no loop
    python benchmarks/busy.py --spin now 0 100000        other lengths of OpenMP's waiting loop
                                                         (GOMP_SPINCOUNT)

pretrain   optimiser steps of the tiny recipe's pre-training: 4.2 M parameters, 8 windows of 256 tokens,
           compiled
sft        optimiser steps of the tiny recipe's SFT on conversations of 40 to 240 tokens, not compiled
ppo        one PPO iteration: 64 prompts, answers of up to 32 tokens, scores, an update in minibatches of 16
decode     one stream of the CPU kernels: SmolLM2's shape (135 M parameters), int8 weights
streams    16 streams at once of the same

Weights and data are random: only speed is measured, and nothing is loaded from the network.

Each measure runs in a process of its own. It is timed alone, beside one busy loop and beside two, in turns,
round after round, and the table has the medians of the rounds. A turn goes on for at least `--seconds`. A
busy loop is a Python process that does nothing but count. It has a session of its own: where the kernel
groups processes by session (autogroup, see /proc/sys/kernel/sched_autogroup_enabled; on by default on
desktops), the scheduler gives equal shares to the loop and to the whole measured program, however many
threads that has. On 2 processors the fair share is then 1/2 beside one loop and 1/3 beside two. Where
autogroup is off each thread counts alone: the fair shares of a program with 2 threads are 2/3 and 1/2.

`others` in the table is what programs outside of this benchmark took of the processors meanwhile. Above a few
per cent the ratios say little.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import side_by_side

LOOPS = (0, 1, 2)
"""Numbers of busy loops beside the measured program."""
SPIN = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
OLD_SPIN = 300_000
"""libgomp's own choice of GOMP_SPINCOUNT, where nobody chooses."""
SETTLE = 1.5
"""Seconds after busy loops have come or gone before a turn begins: the measured program notices them within
about a second (chatwright/openmp.py)."""
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


# --- what is measured ---------------------------------------------------------------------------------------


def repeated(work: Callable[[], float], seconds: float) -> Callable[[], float]:
    """A round that does `work` until `seconds` have passed, at least once; it gives the mean seconds of a
    unit of work.

    `work` returns how many units it did.
    """

    def one_round() -> float:
        done, started = 0.0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or not done:
            done += work()
        return spent / done

    return one_round


def workspace() -> Any:
    """A folder for what stages write."""
    from chatwright.train.workspace import Workspace

    return Workspace(Path(tempfile.mkdtemp(prefix="bench-busy-")), 3)


def tiny_model() -> Any:
    """The tiny recipe's model with random weights."""
    import torch

    from chatwright.model.config import GPTConfig
    from chatwright.model.gpt import GPT

    torch.manual_seed(0)
    return GPT(GPTConfig.preset("modern-tiny", vocab_size=4_096))


def pretrain() -> Callable[[], float]:
    """A unit of work is a token."""
    import torch

    from chatwright import memory
    from chatwright.optim import OptimConfig
    from chatwright.stages import pretrain as stage
    from chatwright.train.fit_config import FitConfig
    from chatwright.train.trainer import Trainer

    memory.tune_allocator()
    model = tiny_model().train()
    optim = OptimConfig(learning_rate=0.03, matrix_learning_rate=0.02, momentum=0.8, beta1=0.8)
    trainer = Trainer({"model": model}, optim, workspace(), metadata={}, texts={})
    step, _, line = stage.fast_step(model, FitConfig(steps=1), alone=True)
    print(f"  {line}")
    draw = torch.Generator().manual_seed(7)

    def work() -> float:
        tokens = torch.randint(4_096, (8, 257), generator=draw)
        trainer.update([stage.TokenBatch(tokens)], step, 1.0)
        return 8 * 256

    return work


def sft() -> Callable[[], float]:
    """A unit of work is a token of a conversation."""
    import torch

    from chatwright import memory, runtime
    from chatwright.chat import EncodedChat
    from chatwright.data.packing import batch_rows, pack
    from chatwright.optim import OptimConfig
    from chatwright.stages import sft as stage
    from chatwright.train.trainer import Trainer

    memory.tune_allocator()
    model = tiny_model().train()
    trainer = Trainer({"model": model}, OptimConfig(name="adamw"), workspace(), metadata={}, texts={})
    draw, dtype, length = torch.Generator().manual_seed(7), runtime.compute_dtype(), 256

    def conversation() -> EncodedChat:
        count = int(torch.randint(40, 240, (), generator=draw))
        ids = torch.randint(4_096, (count,), generator=draw).tolist()
        return EncodedChat(ids, [number > count // 2 for number in range(count)])

    rows = pack([conversation() for _ in range(64)], length)
    portions = [batch_rows(rows[start : start + 8], length) for start in range(0, len(rows) - 7, 8)]
    state = {"next": 0}

    def step(batch: Any) -> Any:
        with runtime.autocast(dtype):
            return stage.step(model, batch)

    def work() -> float:
        portion = portions[state["next"] % len(portions)]
        state["next"] += 1
        trainer.update([portion], step, 1.0)
        return 8.0 * length

    return work


def ppo() -> Callable[[], float]:
    """A unit of work is an answer."""
    import torch

    from chatwright import memory
    from chatwright.chat import NATIVE
    from chatwright.interop.loaded import Loaded
    from chatwright.model.heads import ScalarModel
    from chatwright.optim import OptimConfig
    from chatwright.stages import ppo as stage
    from chatwright.tokenizer import Tokenizer
    from chatwright.train.rl.fixed_prompts import FixedPrompts, PromptSets
    from chatwright.train.rl.models import make_models
    from chatwright.train.rl.run import trainer_of

    memory.tune_allocator()
    text = [f"The number {n} comes after {n - 1}, said the clerk {n % 17} times." for n in range(4_000)]
    base = Loaded(tiny_model(), Tokenizer.train(text, 1_024), NATIVE, "random weights")
    config = stage.Config(
        batch_size=64, minibatch_size=16, max_new_tokens=32, optim=OptimConfig(name="adamw")
    )
    models = make_models(
        base,
        ScalarModel(base.model.config),
        config.critic,
        precision=config.precision,
        policy_precision=config.policy_precision,
    )
    place = workspace()
    trainer = trainer_of(models, config, place, base, {})
    trainer.progress.extra = {"beta": config.beta, "best": None, "history": []}
    draw = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(300, 1_000, (int(torch.randint(16, 64, (), generator=draw)),), generator=draw).tolist()
        for _ in range(256)
    ]
    sets = PromptSets(prompts, FixedPrompts("choosing", prompts, len(prompts)), None)
    run = stage._Run(config, place, trainer, models, base, sets)

    def work() -> float:
        rollout, _ = run.sampled()
        run._update(rollout)
        trainer.take_logged()
        trainer.progress.step += 1
        trainer.progress.consumed += config.batch_size
        return float(config.batch_size)

    return work


def decode(streams: int) -> Callable[[], float]:
    """A unit of work is a token."""
    import torch

    from chatwright import runtime
    from chatwright.generate.engine import Engine
    from chatwright.generate.request import Request
    from chatwright.generate.sampling import Sampling
    from chatwright.language_model import make_runner
    from chatwright.model.config import GPTConfig
    from chatwright.model.gpt import GPT

    torch.manual_seed(0)
    shape = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp_width": 1_536}
    model = GPT(GPTConfig.preset("modern-tiny", **shape, vocab_size=49_152, context=1_024, qk_norm=False))
    engine = Engine(model.eval(), runner=make_runner(model, "int8"), max_batch=streams)
    runtime.set_threads()
    sampling = Sampling(max_new_tokens=64, temperature=0.0)

    def work() -> float:
        engine.forget()
        requests = [
            Request(prompt=(*range(95), 100 + number), sampling=sampling) for number in range(streams)
        ]
        engine.generate(requests)
        return 64.0 * streams

    return work


MEASURES: dict[str, tuple[Callable[[], Callable[[], float]], str]] = {
    "pretrain": (pretrain, "tokens/s"),
    "sft": (sft, "tokens/s"),
    "ppo": (ppo, "answers/s"),
    "decode": (partial(decode, 1), "tokens/s"),
    "streams": (partial(decode, 16), "tokens/s"),
}
"""Name -> how to prepare it, and the unit of its work."""


def prepared(name: str, seconds: float) -> Callable[[], float]:
    """The contender's side: warmed up by three units of work, in which everything is compiled."""
    from chatwright import runtime

    runtime.set_threads()
    work = MEASURES[name][0]()
    for _ in range(3):
        work()
    return repeated(work, seconds)


# --- beside what --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[list[int]]:
    """So many busy loops, each in a session of its own; their process ids. They end with the context."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in range(count)
    ]
    try:
        time.sleep(SETTLE)
        yield [loop.pid for loop in loops]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def processor_seconds(pid: int) -> float:
    """Processor time of a process with all its threads so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Processor time of all programs on the machine so far, and what its host took away (Linux)."""
    fields = [
        int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]
    ]
    idle, waiting = fields[3:5]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def turn(contestant: side_by_side.Contestant, loops: int) -> dict[str, float]:
    """One round beside so many loops: seconds of a unit of work, processors used by it, by the loops, by
    others."""
    with busy_loops(loops) as pids:
        ours, theirs, all_before = (
            processor_seconds(contestant.pid),
            sum(map(processor_seconds, pids)),
            machine_seconds(),
        )
        started = time.perf_counter()
        answer = contestant.round()
        spent = time.perf_counter() - started
        ours = processor_seconds(contestant.pid) - ours
        theirs = sum(map(processor_seconds, pids)) - theirs
        others = max(0.0, machine_seconds() - all_before - ours - theirs)
    return {
        "seconds": answer["seconds"],
        "ours": ours / spent,
        "loops": theirs / spent,
        "others": others / spent,
    }


# --- the table ----------------------------------------------------------------------------------------------


def environment(spin: str) -> Mapping[str, str]:
    """What a contender finds in its environment: `now` nothing about OpenMP's waiting, `old` what libgomp
    would do, or a count."""
    clean = {key: value for key, value in os.environ.items() if key not in SPIN}
    return clean if spin == "now" else {**clean, SPIN[0]: str(OLD_SPIN if spin == "old" else int(spin))}


def measured(
    name: str, spins: Sequence[str], beside: Sequence[int], rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Rounds in turns; the samples by `SPIN/LOOPS`."""
    samples: dict[str, list[dict[str, float]]] = {f"{spin}/{loops}": [] for spin in spins for loops in beside}
    with contextlib.ExitStack() as stack:
        contestants = {}
        for spin in spins:
            print(f"  {name}, spin {spin}: preparing ...", flush=True)
            options = ["--seconds", str(seconds)]
            contestants[spin] = stack.enter_context(
                side_by_side.Contestant(
                    __file__, name, options, environment=environment(spin), own_session=True
                )
            )
        for number in range(rounds):
            for loops in beside:
                for spin, contestant in contestants.items():
                    samples[f"{spin}/{loops}"].append(turn(contestant, loops))
            line = "  ".join(f"{key} {1 / rows[-1]['seconds']:,.0f}" for key, rows in samples.items())
            print(f"  round {number + 1}/{rounds}: {line} {MEASURES[name][1]}", flush=True)
    return samples


def table(name: str, samples: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Print what came out; the ratios: beside loops over alone, and alone over alone as before."""
    ratios: dict[str, float] = {}
    print(f"\n{name:10} spin     loops   {MEASURES[name][1]:>9}   of alone   processors: own  loops  others")
    for key, rows in samples.items():
        spin, loops = key.split("/")
        alone = [row["seconds"] for row in samples[f"{spin}/0"]]
        ratio = side_by_side.median_ratio([row["seconds"] for row in rows], alone)
        own, theirs, others = (
            statistics.median(row[part] for row in rows) for part in ("ours", "loops", "others")
        )
        speed = 1 / statistics.median(row["seconds"] for row in rows)
        print(
            f"{'':10} {spin:8} {loops:>5}   {speed:9,.1f}   {ratio:8.2f}   {own:15.2f}  {theirs:5.2f}  "
            f"{others:6.2f}"
        )
        if loops != "0":
            ratios[f"{name}/{spin}/beside_{loops}"] = ratio
        elif spin != "old" and "old/0" in samples:
            ratios[f"{name}/{spin}/alone_over_old"] = side_by_side.median_ratio(
                alone, [row["seconds"] for row in samples["old/0"]]
            )
            print(f"{'':10} {spin:8} alone over old alone: {ratios[f'{name}/{spin}/alone_over_old']:.3f}")
    return ratios


def main() -> int:
    """The measures one after the other, their tables, results/busy.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="least seconds of a turn")
    parser.add_argument("--spin", nargs="+", default=["now"], help="now, old, or values of GOMP_SPINCOUNT")
    parser.add_argument("--alone", action="store_true", help="not beside busy loops")
    parser.add_argument("--contender", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        return side_by_side.serve_rounds(partial(prepared, options.contender, options.seconds))
    group = AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else "not there"
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} processors; autogroup: {group}; load before: {load:.2f}", flush=True)
    beside = LOOPS[:1] if options.alone else LOOPS
    ratios: dict[str, float] = {}
    kept: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no busy loop outlives a `kill`
    with tempfile.TemporaryDirectory(prefix="bench-busy-") as directory:
        os.environ["TMPDIR"] = directory  # contenders are ended by force and clean nothing up
        for name in options.only:
            samples = measured(name, options.spin, beside, options.rounds, options.seconds)
            ratios |= table(name, samples)
            kept |= {f"{name}/{key}": rows for key, rows in samples.items()}
    command = " ".join(["python benchmarks/busy.py", *sys.argv[1:]])
    print(side_by_side.write_results("busy", ratios, command, ["numba"], kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
