"""Generation on this machine's CPU: our engine beside llama.cpp and transformers.

    make bench-generate                                    # with llama.cpp compiled for speed, which takes
                                                           # ten minutes more
    python benchmarks/generate.py                          # everything, about 12 minutes; --only decode for a
                                                           # part
    python benchmarks/generate.py --only perplexity --run runs/tiny      # needs: chatwright run tiny --until
    data

decode      one stream: SmolLM2-135M, 96 tokens of prompt, 128 greedy tokens, against llama.cpp's bf16, Q8_0
            and Q4_0
prefill     512 tokens of prompt
streams     16 sequences at once, 64 tokens each; also against one stream of our own
gpt2        one stream of a GPT-2 of 124 M parameters (random weights) against transformers' generate
prefix      time to the first token of a prompt whose first 90 % were seen before, against a cold start
perplexity  held-out text, int8 and int4 against bf16 weights

All but the last in turns, each contender in a process of its own, all of the machine's cores. Ours is the
whole engine with its sampler; llama.cpp is its C interface with the likeliest token found by numpy, which
costs it less. llama.cpp reads the files that `chatwright export` and llama.cpp's own quantiser write. A peer
that dies (llama.cpp's Q8_0 with an illegal instruction on some processors with AMX) is named and left out;
the others are measured. Behind each of ours stands which instructions its kernels use.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch

from chatwright import runtime

PROMPT, ANSWER, LONG, SEQUENCES, EACH = 96, 128, 512, 16, 64
PAIRS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
FILES = Path(__file__).parent / "results" / "models"
TEXT = (
    "The history of the city begins with a small settlement on the northern bank of the river, where traders "
    "met. "
)


def prompt(tokens: int) -> list[int]:
    """The beginning of a text, as SmolLM2's token ids."""
    from chatwright.language_model import load_parts

    tokenizer = load_parts("smollm2").tokenizer
    assert tokenizer is not None
    return tokenizer.encode(TEXT * 60)[:tokens]


# --- ours ---------------------------------------------------------------------------------------------------


def _engine(dtype: str, **options: Any) -> Any:
    from chatwright.generate.engine import Engine
    from chatwright.language_model import load_parts, make_runner

    runtime.set_threads()
    parts = load_parts("smollm2")
    runner = make_runner(parts.model, dtype)
    print(f"  ours: {runner.described()}", file=sys.stderr)  # type: ignore[union-attr]
    return Engine(parts.model, parts.tokenizer, runner=runner, max_context=2048, **options)


def _requests(prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
    from chatwright.generate.request import Request
    from chatwright.generate.sampling import Sampling

    sampling = Sampling(max_new_tokens=tokens, temperature=0.0)
    return [Request(prompt=tuple(one), sampling=sampling) for one in prompts]


def _timed_after_prefill(engine: Any, requests: Sequence[Any]) -> float:
    """Seconds from the first tokens to the last. An idle engine reads all these prompts in one step, so they
    begin together."""
    before = engine.stats.new_tokens
    for request in requests:
        engine.submit(request)
    while engine.stats.new_tokens < before + len(requests):
        engine.step()
    started = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - started


def ours_decode(dtype: str) -> Callable[[], float]:
    """One stream."""
    engine, ids = _engine(dtype), prompt(PROMPT)

    def one_round() -> float:
        engine.forget()
        return _timed_after_prefill(engine, _requests([ids], ANSWER + 1))

    one_round()
    return one_round


def ours_prefill(dtype: str) -> Callable[[], float]:
    """A long prompt and one token."""
    engine, ids = _engine(dtype), prompt(LONG)

    def one_round() -> float:
        engine.forget()
        started = time.perf_counter()
        engine.generate(_requests([ids], 1))
        return time.perf_counter() - started

    one_round()
    return one_round


def ours_streams(dtype: str) -> Callable[[], float]:
    """Many sequences."""
    engine, ids = _engine(dtype, max_batch=SEQUENCES), prompt(PROMPT)
    prompts = [[*ids[:-1], 100 + number] for number in range(SEQUENCES)]

    def one_round() -> float:
        engine.forget()
        return _timed_after_prefill(engine, _requests(prompts, EACH + 1))

    one_round()
    return one_round


# --- llama.cpp ----------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp through its C interface."""

    def __init__(self, kind: str, *, sequences: int = 1) -> None:
        import llama_cpp
        import psutil

        self.api = llama_cpp
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        file = FILES / f"smollm2-{kind}.gguf"
        if not file.exists():
            raise SystemExit(f"there is no {file}: llama.cpp could not write it (see above)")
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        threads = psutil.cpu_count(logical=True) or 1
        params.n_ctx, params.n_batch, params.n_ubatch = 2048 * max(1, sequences // 4), 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def feed(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether its logits are wanted)."""
        for place, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, sequence
            self.batch.logits[place] = wanted
        self.batch.n_tokens = len(tokens)
        if self.api.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")

    def best(self, place: int) -> int:
        """The likeliest token behind a place of the last batch."""
        logits = self.api.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def read(self, ids: Sequence[int], sequence: int = 0) -> int:
        self.feed([(token, at, sequence, at == len(ids) - 1) for at, token in enumerate(ids)])
        return self.best(len(ids) - 1)


def _make_silent() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


_silent: Any = None


def llama_decode(kind: str) -> Callable[[], float]:
    """One stream."""
    llama, ids = Llama(kind), prompt(PROMPT)

    def one_round() -> float:
        llama.clear()
        token = llama.read(ids)
        started = time.perf_counter()
        for step in range(ANSWER):
            llama.feed([(token, PROMPT + step, 0, True)])
            token = llama.best(0)
        return time.perf_counter() - started

    one_round()
    return one_round


def llama_prefill(kind: str) -> Callable[[], float]:
    """A long prompt and one token."""
    llama, ids = Llama(kind), prompt(LONG)

    def one_round() -> float:
        llama.clear()
        started = time.perf_counter()
        llama.read(ids)
        return time.perf_counter() - started

    one_round()
    return one_round


def llama_streams(kind: str) -> Callable[[], float]:
    """Many sequences."""
    llama, ids = Llama(kind, sequences=SEQUENCES), prompt(PROMPT)

    def one_round() -> float:
        llama.clear()
        tokens = [llama.read([*ids[:-1], 100 + number], number) for number in range(SEQUENCES)]
        started = time.perf_counter()
        for step in range(EACH):
            llama.feed([(token, PROMPT + step, number, True) for number, token in enumerate(tokens)])
            tokens = [llama.best(number) for number in range(SEQUENCES)]
        return time.perf_counter() - started

    one_round()
    return one_round


def write_files() -> None:
    """SmolLM2 for llama.cpp: bf16 by our export, the others by its own quantiser from that.

    Each in a process of its own: where llama.cpp dies, what it could not write is named, and the rest goes
    on.
    """
    from chatwright.commands.export import main as main_export

    FILES.mkdir(parents=True, exist_ok=True)
    source = FILES / "smollm2-bf16.gguf"
    if not source.exists():
        main_export(["smollm2", str(source), "--format", "gguf", "--dtype", "bf16"])
    for kind in ("q8_0", "q4_0"):
        if (FILES / f"smollm2-{kind}.gguf").exists():
            continue
        done = subprocess.run([sys.executable, __file__, "--quantise", kind], check=False)
        if done.returncode:
            print(
                f"  LEFT OUT: llama.cpp's quantiser for {kind} {side_by_side.how_ended(done.returncode)}",
                flush=True,
            )


def quantise(kind: str) -> int:
    """Let llama.cpp write its file of this kind."""
    import llama_cpp

    number = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    source, target = FILES / "smollm2-bf16.gguf", FILES / f"smollm2-{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    aside = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(aside).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not write {target}")
    aside.rename(target)
    return 0


# --- GPT-2 of 124 M parameters ------------------------------------------------------------------------------


def _gpt2() -> Any:
    """Random weights: the speed is the same."""
    from chatwright.model.config import GPTConfig
    from chatwright.model.gpt import GPT

    torch.manual_seed(0)
    return GPT(GPTConfig.preset("gpt2")).eval()


def ours_gpt2(dtype: str) -> Callable[[], float]:
    """One stream of our engine."""
    from chatwright.generate.engine import Engine
    from chatwright.language_model import make_runner

    runtime.set_threads()
    model = _gpt2()
    engine = Engine(model, runner=make_runner(model, dtype))

    def one_round() -> float:
        engine.forget()
        return _timed_after_prefill(engine, _requests([list(range(PROMPT))], ANSWER + 1))

    one_round()
    return one_round


def transformers_gpt2(precision: str) -> Callable[[], float]:
    """transformers' generate with its default cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    ids = torch.arange(PROMPT)[None]
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def one_round() -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=1, **settings)
            middle = time.perf_counter()
            model.generate(ids, max_new_tokens=ANSWER + 1, **settings)
            return time.perf_counter() - middle - (middle - started)

    one_round()
    return one_round


# --- without a peer -----------------------------------------------------------------------------------------


def shared_prefix(rounds: int) -> tuple[float, dict[str, list[float]]]:
    """First token of a 1,000-token prompt: warm (its first 900 tokens were part of an earlier one) over
    cold."""
    engine, ids = _engine("bf16"), prompt(1000)
    samples: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(rounds + 1):
        for kind in samples:
            engine.forget()
            if kind == "warm":
                engine.generate(_requests([[*ids[:900], *range(200 + number, 300 + number)]], 1))
            started = time.perf_counter()
            engine.generate(_requests([ids], 1))
            if number:
                samples[kind].append(time.perf_counter() - started)
    return statistics.median(w / c for w, c in zip(samples["warm"], samples["cold"], strict=True)), samples


def perplexities(run: str, tokens: int = 8_192, window: int = 512) -> dict[str, float]:
    """Perplexity of held-out text, by dtype."""
    from chatwright.data.examples import Document
    from chatwright.data.records import read_records
    from chatwright.generate.runner import Feed
    from chatwright.language_model import load_parts, make_runner

    parts = load_parts("smollm2")
    assert parts.tokenizer is not None
    ids: list[int] = []
    for record in read_records(Path(run) / "data" / "records" / "validation.jsonl", Document):
        ids += [parts.tokenizer.end_of_text_id, *parts.tokenizer.encode(record.text)]
        if len(ids) >= tokens:
            break
    found = {}
    for dtype in ("fp32", *PAIRS):
        runner = make_runner(parts.model, dtype)
        assert runner is not None
        runner.allocate(window // 16, 16)
        total, count = 0.0, 0
        for start in range(0, tokens - window + 1, window):
            row = ids[start : start + window]
            logits = runner.forward([Feed(row, 0, range(window // 16), window)])
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum")
            )
            count += window - 1
        found[dtype] = math.exp(total / count)
        print(
            f"  {dtype:5} perplexity {found[dtype]:.4f}  {100 * (found[dtype] / found['fp32'] - 1):+.2f} % "
            "of fp32",
            flush=True,
        )
    return found


def read_bandwidth() -> float:
    """Bytes a second at which all threads together read memory, by torch's sum of 400 MB; best of 10."""
    block = torch.zeros(100_000_000)
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - started)
    return 4 * block.numel() / best


CONTENDERS: dict[str, Callable[[], Callable[[], float]]] = {
    **{f"decode/ours_{dtype}": partial(ours_decode, dtype) for dtype in PAIRS},
    **{f"decode/llama_{kind}": partial(llama_decode, kind) for kind in PAIRS.values()},
    **{f"prefill/ours_{dtype}": partial(ours_prefill, dtype) for dtype in PAIRS},
    **{f"prefill/llama_{kind}": partial(llama_prefill, kind) for kind in PAIRS.values()},
    **{f"streams/ours_{dtype}": partial(ours_streams, dtype) for dtype in ("bf16", "int8")},
    **{f"streams/llama_{kind}": partial(llama_streams, kind) for kind in ("bf16", "q8_0")},
    "gpt2/ours_bf16": partial(ours_gpt2, "bf16"),
    "gpt2/ours_int8": partial(ours_gpt2, "int8"),
    "gpt2/transformers_bf16": partial(transformers_gpt2, "bf16"),
    "gpt2/transformers_fp32": partial(transformers_gpt2, "fp32"),
}
TOKENS = {"decode": ANSWER, "prefill": LONG, "streams": SEQUENCES * EACH, "gpt2": ANSWER}
PARTS = (*TOKENS, "prefix", "perplexity")


def compared(part: str, samples: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our speed over the peers', medians of pairs."""
    seconds = {name.split("/")[1]: one["seconds"] for name, one in samples.items()}
    ratios = {}
    if part == "gpt2":
        for dtype in ("bf16", "int8"):
            for peer in seconds:
                if peer.startswith("transformers"):
                    ratios[f"gpt2-124m/{dtype}/{peer}"] = side_by_side.median_ratio(
                        seconds[f"ours_{dtype}"], seconds[peer]
                    )
        return ratios
    suffix = {"decode": "", "prefill": "_prefill", "streams": "_16_streams"}[part]
    for dtype, kind in PAIRS.items():
        if f"ours_{dtype}" in seconds and f"llama_{kind}" in seconds:
            ratios[f"smollm2/{dtype}{suffix}/llama.cpp"] = side_by_side.median_ratio(
                seconds[f"ours_{dtype}"], seconds[f"llama_{kind}"]
            )
    if part == "streams" and "smollm2/bf16_16_streams/llama.cpp" in ratios:
        ratios["smollm2/16_streams/llama.cpp"] = ratios["smollm2/bf16_16_streams/llama.cpp"]
    return ratios


def _report(part: str, samples: dict[str, dict[str, Any]], ratios: dict[str, float]) -> None:
    for name, one in samples.items():
        speed = TOKENS[part] / statistics.median(one["seconds"])
        print(f"{name:26} {speed:8.1f} tokens/s   {one['peak_mb']:7,.0f} MB at most")
    for name, ratio in ratios.items():
        print(f"{name:44} {ratio:.2f}x")


def main() -> int:
    """Parts one after the other, the table, results/generate.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", default="runs/tiny", help="a run with its data stage, for the perplexity")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--quantise", choices=("q8_0", "q4_0"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quantise:
        return quantise(options.quantise)
    if options.contender:
        if "llama" in options.contender:
            global _silent
            _silent = _make_silent()
        return side_by_side.serve_rounds(CONTENDERS[options.contender])
    if not {"decode", "prefill", "streams"}.isdisjoint(options.only):
        write_files()
    results: dict[str, Any] = {"ratios": {}, "samples": {}}
    for part in options.only:
        print(f"[{part}]", flush=True)
        if part == "prefix":
            ratio, samples = shared_prefix(options.rounds)
            results["ratios"]["smollm2/prefix_90_first_token"] = ratio
            results["samples"][part] = samples
            print(f"first token with 90 % of the prompt known: {ratio:.3f} of a cold start")
        elif part == "perplexity":
            found = perplexities(options.run)
            for dtype in ("int8", "int4"):
                results["ratios"][f"smollm2/{dtype}/perplexity_over_bf16"] = found[dtype] / found["bf16"]
            results["samples"][part] = found
        else:
            names = [name for name in CONTENDERS if name.startswith(part + "/")]
            if (
                part == "gpt2" and not runtime.has_bf16()
            ):  # emulated products: minutes for each answer, no peer's best setting
                names.remove("gpt2/transformers_bf16")
                print("this processor has no bf16 products: transformers runs in float32 only", flush=True)
            rounds = side_by_side.run_iterations(__file__, names, options.rounds)
            ratios = compared(part, rounds)
            _report(part, rounds, ratios)
            results["ratios"] |= ratios
            results["samples"] |= rounds
    command = "python benchmarks/generate.py " + " ".join(sys.argv[1:])
    file = side_by_side.write_results(
        "generate", results["ratios"], command, ["numba", "transformers"], results["samples"]
    )
    print(
        f"memory read at {read_bandwidth() / 1e9:.1f} GB/s; {file} written: {json.dumps(results['ratios'])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
