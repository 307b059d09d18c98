"""Training speed and memory next to transformers and litgpt: the same shape, batch and data, in turns.

    python benchmarks/train.py                  14 M parameters: 6 x 384, vocabulary 8,192, context 256, batch
                                                16
    python benchmarks/train.py --shape 124m     GPT-2: 12 x 768, vocabulary 50,257, context 1,024, batch 2;
                                                all contenders stay in
                                                memory, 5 GB each: choose with --only where there is less than
                                                48 GB
    python benchmarks/train.py --head           memory of the loss head at vocabulary 32,768
    python benchmarks/train.py --profile        where the milliseconds of our steps go

A round is some optimiser steps: forward, backward, clipping at 1.0, AdamW (fused, for all contenders),
zero_grad. Every contender gets the same tokens in the same order. `gemm` multiplies bf16 matrices of 2,048 in
the same turns: the peak. Below the table stands which kernels oneDNN multiplies with: `amx` in their names
means tiles.

Model FLOP: 6 per parameter that is a factor of a product, and token; attention 6 L D T per token, the causal
half (half of what PaLM's appendix B and the `mfu` of metrics.jsonl count: what a causal model must compute).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import side_by_side
import torch
from torch import Tensor, nn

from chatwright import memory, optim, runtime
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain
from chatwright.stages.pretrain import TokenBatch
from chatwright.train.fit_config import FitConfig


@dataclass(frozen=True)
class Shape:
    """What is trained, and how much of it a round is."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    batch: int
    steps: int
    """Optimiser steps of a round."""

    def gpt2(self) -> GPTConfig:
        """As GPT-2."""
        return GPTConfig.preset(
            "gpt2",
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            vocab_size=self.vocab_size,
            context=self.context,
        )

    def modern(self) -> GPTConfig:
        """The same width and depth as Qwen3: SwiGLU of 8/3 the width has as many parameters as GPT-2's
        MLP."""
        return GPTConfig.preset(
            "modern-tiny",
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.width * 8 // 3,
            vocab_size=self.vocab_size,
            context=self.context,
        )

    @property
    def tokens(self) -> int:
        """Targets of a round."""
        return self.steps * self.batch * self.context


SHAPES = {
    "14m": Shape(6, 384, 6, 8_192, 256, batch=16, steps=4),
    "124m": Shape(12, 768, 12, 50_257, 1_024, batch=2, steps=1),
}
RATE, BETAS = 6e-4, (0.9, 0.95)


def flop_per_token(config: GPTConfig) -> float:
    """See the module's docstring."""
    with torch.device("meta"):
        model = GPT(config)
    tables = model.positions.weight.numel() if model.positions is not None else 0
    tables += 0 if config.tied else model.embed.weight.numel()
    return (
        6 * (model.parameter_count() - tables)
        + 6 * config.layers * config.heads * config.head_dim * config.context
    )


def batches(shape: Shape) -> Callable[[], Tensor]:
    """The same (batch, context + 1) tokens for every contender, round after round."""
    draw = torch.Generator().manual_seed(7)
    return lambda: torch.randint(shape.vocab_size, (shape.batch, shape.context + 1), generator=draw)


def rounds_of(
    shape: Shape,
    step: Callable[[Tensor], Tensor],
    optimisers: list[torch.optim.Optimizer],
    model: nn.Module,
    warm: int = 3,
) -> Callable[[], float]:
    """A round of `step` (tokens -> mean loss, whose backward pass fills the gradients) with everything around
    it."""
    draw, parameters = batches(shape), list(model.parameters())

    def one_step() -> float:
        loss = step(draw())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    first = [one_step() for _ in range(warm)]
    expected = torch.log(torch.tensor(float(shape.vocab_size))).item()
    if not abs(first[0] - expected) < 0.5:
        raise SystemExit(
            f"the first loss is {first[0]:.3f}, that of an untrained model is about {expected:.3f}"
        )

    def one_round() -> float:
        started = time.perf_counter()
        for _ in range(shape.steps):
            one_step()
        return time.perf_counter() - started

    return one_round


def ours(shape: Shape, config: GPTConfig, name: str) -> Callable[[], float]:
    """The stage's own step, with the settings that `chatwright pretrain` takes on this machine."""
    memory.tune_allocator()
    torch.manual_seed(0)
    model = GPT(config)
    model.train()
    step, _, line = pretrain.fast_step(model, FitConfig(steps=1), alone=True)
    print(f"  ours: {line}", file=sys.stderr)
    optimisers = optim.build(
        model, OptimConfig(name=name, learning_rate=RATE, beta1=BETAS[0], beta2=BETAS[1])
    )  # type: ignore[arg-type]
    targets = shape.batch * shape.context
    return rounds_of(shape, lambda tokens: step(TokenBatch(tokens)).loss / targets, optimisers, model)


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """For the peers: the fused one, which is the fastest on a CPU as well."""
    return [torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)]


def peer(
    shape: Shape, model: nn.Module, loss_of: Callable[[Tensor], Tensor], *, fast: bool
) -> Callable[[], float]:
    """A plain loop: eager float32, or compiled with bf16 autocast."""
    compiled = torch.compile(loss_of, dynamic=False) if fast else loss_of

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            return compiled(tokens)

    return rounds_of(shape, step, adamw(model), model)


def transformers_gpt2(shape: Shape, *, fast: bool) -> Callable[[], float]:
    """transformers' GPT2LMHeadModel with SDPA attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return peer(shape, model, loss_of, fast=fast)


def litgpt_gpt2(shape: Shape, *, fast: bool) -> Callable[[], float]:
    """litgpt's model in the nearest shape it has: rotary positions instead of learned ones, head not tied (no
    more work)."""
    from litgpt import GPT as LitGPT
    from litgpt import Config

    torch.manual_seed(0)
    model = LitGPT(
        Config(
            name="bench",
            block_size=shape.context,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            bias=True,
            rotary_percentage=1.0,
            parallel_residual=False,
            norm_class_name="LayerNorm",
            mlp_class_name="GptNeoxMLP",
            intermediate_size=4 * shape.width,
            gelu_approximate="tanh",
        )
    )
    model.apply(
        lambda module: (
            nn.init.normal_(module.weight, std=0.02) if isinstance(module, nn.Linear | nn.Embedding) else None
        )
    )
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return peer(shape, model, loss_of, fast=fast)


def gemm() -> Callable[[], float]:
    """Seconds for 10^12 operations of bf16 matrix products, the best of the round's: its inverse is the
    peak."""
    size = 2_048
    left, right = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()

    def one_round() -> float:
        best = float("inf")
        for _ in range(12):
            started = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - started)
        return best * 1e12 / (2 * size**3)

    one_round()
    return one_round


def contenders(shape: Shape) -> dict[str, side_by_side.Contender]:
    """By name."""
    return {
        "gemm": gemm,
        "ours": lambda: ours(shape, shape.gpt2(), "adamw"),
        "ours_modern": lambda: ours(shape, shape.modern(), "adamw"),
        "ours_modern_muon": lambda: ours(shape, shape.modern(), "muon"),
        "transformers_eager_fp32": lambda: transformers_gpt2(shape, fast=False),
        "transformers_compiled_bf16": lambda: transformers_gpt2(shape, fast=True),
        "litgpt_eager_fp32": lambda: litgpt_gpt2(shape, fast=False),
        "litgpt_compiled_bf16": lambda: litgpt_gpt2(shape, fast=True),
    }


def table(name: str, shape: Shape, samples: dict[str, dict[str, object]]) -> dict[str, float]:
    """Print what came out; the ratios."""
    seconds: dict[str, list[float]] = {key: row["seconds"] for key, row in samples.items()}  # type: ignore[misc]
    flop = {"ours": flop_per_token(shape.gpt2()) * shape.tokens}
    flop["ours_modern"] = flop["ours_modern_muon"] = flop_per_token(shape.modern()) * shape.tokens
    ratios = {}
    print(f"\n{name}: {shape}\n{'':28} tokens/s   share of the peak   peak memory   ours is faster by")
    for key, spent in seconds.items():
        if key == "gemm":
            continue
        work = flop.get(key, flop["ours"])
        share = statistics.median(work / s * g / 1e12 for s, g in zip(spent, seconds["gemm"], strict=True))
        faster = side_by_side.median_ratio(seconds["ours"], spent)
        label = {
            "ours": "gemm_peak",
            "ours_modern": "gemm_peak_modern",
            "ours_modern_muon": "gemm_peak_modern_muon",
        }.get(key)
        ratios[f"{name}/{label or key}"] = share if label else faster
        rate = shape.tokens / statistics.median(spent)
        print(f"{key:28} {rate:8,.0f}   {share:17.2f}   {samples[key]['peak_mb']:8,.0f} MB   {faster:6.2f}")
        if not label:
            ratios[f"{name}/{key}/memory"] = float(samples["ours"]["peak_mb"]) / float(
                samples[key]["peak_mb"]
            )  # type: ignore[arg-type]
    peak = 1e3 / statistics.median(seconds["gemm"])
    print(f"bf16 GEMM peak: {peak:,.0f} GFLOP/s (median of the rounds' best)")
    print("products: " + ", ".join(f"{key} {value}" for key, value in side_by_side.products().items()))
    return ratios


HEAD = {"rows": 4_096, "width": 512, "vocabulary": 32_768}


def head_memory(which: str) -> float:
    """MB above the inputs at the largest moment of a forward and backward pass of the loss head, in a fresh
    process."""
    import resource

    from chatwright.objectives.language import chunked_next_token_loss, next_token_loss

    memory.tune_allocator()
    torch.manual_seed(0)
    hidden = torch.randn(8, HEAD["rows"] // 8, HEAD["width"], requires_grad=True)
    head = (0.02 * torch.randn(HEAD["vocabulary"], HEAD["width"])).requires_grad_()
    targets = torch.randint(HEAD["vocabulary"], hidden.shape[:2])
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))  # what the libraries keep for themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "ours":
        loss = chunked_next_token_loss(hidden, head, targets)
    else:
        loss = next_token_loss(nn.functional.linear(hidden, head), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def head() -> int:
    """Compare the loss head's memory with F.linear + cross_entropy."""
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(5):
        for which, values in found.items():
            command = [sys.executable, __file__, "--contender", f"head:{which}"]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    ours, plain = (statistics.median(values) for values in found.values())
    print(f"loss head, {HEAD}, float32: {plain:,.0f} MB plain, {ours:,.0f} MB in chunks: {ours / plain:.3f}")
    print(
        side_by_side.write_results(
            "train",
            {"head_memory": ours / plain},
            "python benchmarks/train.py --head",
            [],
            {"head": {"shape": HEAD, "mb": found}},
        )
    )
    return 0


def part_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """What an event of the profiler belongs to."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "Muon" if "Muon" in above.name else "AdamW"
        above = above.cpu_parent
    if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return "matrix products of the model and the loss head"
    if event.name in ("aten::bmm", "aten::baddbmm"):
        return "products of attention"
    if "ompiled" in event.name:
        return "compiled: norms, activations, softmax, rotary, loss"
    return "the rest: bf16 copies, gradients onto the masters, clipping, Python"


def profile(shape: Shape) -> int:
    """Milliseconds of a step by part, torch.profiler over a round; self times, so that they add up to the
    step."""
    makers = {
        "GPT-2 shape, AdamW": lambda: ours(shape, shape.gpt2(), "adamw"),
        "modern, AdamW": lambda: ours(shape, shape.modern(), "adamw"),
        "modern, Muon": lambda: ours(shape, shape.modern(), "muon"),
    }
    for name, make in makers.items():
        one_round = make()
        plain = statistics.median(one_round() for _ in range(3)) / shape.steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            watched = one_round() / shape.steps
        spent: dict[str, float] = {}
        for event in seen.events():
            spent[part_of(event)] = (
                spent.get(part_of(event), 0.0) + event.self_cpu_time_total / 1e3 / shape.steps
            )
        spent["the rest: bf16 copies, gradients onto the masters, clipping, Python"] += 1e3 * watched - sum(
            spent.values()
        )
        print(f"\n{name}: {1e3 * plain:,.0f} ms a step ({1e3 * watched:,.0f} under the profiler)")
        for part, milliseconds in sorted(spent.items(), key=lambda row: -row[1]):
            print(f"  {milliseconds:8,.1f}  {part}")
    return 0


def main() -> int:
    """Run the contenders of a shape, print the table, write results/train.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--head", action="store_true", help="memory of the loss head instead")
    parser.add_argument(
        "--profile", action="store_true", help="where the milliseconds of our steps go, instead"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="some of the contenders; gemm and ours are always there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runtime.set_threads()
    if options.head:
        return head()
    name, _, who = (options.contender or f"{options.shape}:").partition(":")
    if name == "head":
        print(head_memory(who))
        return 0
    shape = SHAPES[name]
    if options.profile:
        return profile(shape)
    if who:
        return side_by_side.serve_rounds(contenders(shape)[who])
    chosen = [key for key in contenders(shape) if not options.only or key in ("gemm", "ours", *options.only)]
    found = side_by_side.run_iterations(__file__, [f"{name}:{key}" for key in chosen], options.rounds)
    samples = {key.partition(":")[2]: row for key, row in found.items()}
    ratios = table(name, shape, samples)
    command = " ".join(["python benchmarks/train.py", *sys.argv[1:]])
    kept = {name: {"shape": dataclasses.asdict(shape), "contenders": samples}}
    packages = [
        package for package in ("transformers", "litgpt") if any(key.startswith(package) for key in samples)
    ]
    print(side_by_side.write_results("train", ratios, command, packages, kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
