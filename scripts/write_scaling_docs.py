"""The tables of docs/lab/scaling.md, computed: memory, traffic and time of a training step on many processes.

`python scripts/write_scaling_docs.py` writes them; `--check` only says whether they are up to date. Formulae,
with their sources and units, are the docstrings below; the page shows them and these are what computes it.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from chatwright.model.config import GPTConfig

PAGE = Path(__file__).parent.parent / "docs" / "lab" / "scaling.md"


@dataclass(frozen=True)
class Machine:
    """A GPU and its wires. Figures of the makers, none of ours: an H100 SXM in machines of eight."""

    memory: float = 80e9
    """Bytes."""
    flop: float = 989e12
    """bf16 products with float32 sums, dense, per second."""
    utilisation: float = 0.4
    """Share of it that training reaches (an assumption; measure yours: `mfu` in metrics.jsonl)."""
    inside: float = 450e9
    """Bytes per second between GPUs of one machine, one direction."""
    between: float = 50e9
    """The same between machines, per GPU (400 Gbit/s each)."""
    per_machine: int = 8
    """GPUs of a machine."""


@dataclass(frozen=True)
class Setup:
    """A model on a box of processes: copies x shard x tensor, as chatwright/train/parallel/context.py
    arranges them."""

    name: str
    shape: GPTConfig
    batch_tokens: float
    micro_batch: int
    copies: int = 1
    shard: int = 1
    tensor: int = 1
    recompute: bool = False

    @property
    def processes(self) -> int:
        """All of them."""
        return self.copies * self.shard * self.tensor

    @property
    def micro_batches(self) -> int:
        """Forward passes of a process per optimiser step."""
        tokens = self.batch_tokens / (self.copies * self.shard)
        return max(1, math.ceil(tokens / (self.micro_batch * self.shape.context)))


def block_parameters(shape: GPTConfig) -> float:
    """Matrices of all blocks: L (2 D H Q + 2 D G Q + m D M), m = 3 with a gate, else 2. Norms and biases are
    left out."""
    heads = 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads)
    return float(
        shape.layers * (heads + (3 if shape.activation == "swiglu" else 2) * shape.width * shape.mlp_width)
    )


def root_parameters(shape: GPTConfig) -> float:
    """Tables and output matrix: V D (twice when they are not tied) + C D. Not cut by `tensor`."""
    positions = shape.context if shape.position == "learned" else 0
    return float(shape.width * (shape.vocab_size * (1 if shape.tied else 2) + positions))


def memory(setup: Setup) -> dict[str, float]:
    """Bytes per process.

    Kept: weights, gradients and AdamW's two moments in float32, 4 + 4 + 8 = 16 bytes a parameter, over
    `shard` and, for blocks, `tensor`. Put together: what FSDP holds whole at once, the root's weights and
    gradient in float32 and two blocks' weights in bf16. Activations: s b D (10 + 24 / tensor) bytes a layer
    (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2 without the 5 a s / h of attention weights, which the
    fused kernel never stores); with recomputation 4 s b D a layer, the float32 residual stream, and one
    layer's own. Logits: two chunks of 1,024 in float32.
    """
    shape, blocks, root = setup.shape, block_parameters(setup.shape), root_parameters(setup.shape)
    kept = 16 * (blocks / setup.tensor + root) / setup.shard
    together = 0.0
    if setup.shard > 1:
        together = 8 * root + 2 * 2 * blocks / shape.layers / setup.tensor
    layer = shape.context * setup.micro_batch * shape.width * (10 + 24 / setup.tensor)
    stream = shape.context * setup.micro_batch * shape.width * 4
    activations = layer + shape.layers * stream if setup.recompute else shape.layers * layer
    return {
        "kept": kept,
        "together": together,
        "activations": activations,
        "logits": 2 * 1024 * 4.0 * shape.vocab_size,
    }


def traffic(setup: Setup) -> dict[str, float]:
    """Bytes that a process sends per optimiser step (ring collectives: an all-gather or reduce-scatter of X
    bytes over n processes sends X (n - 1) / n from each, an all-reduce twice that; Rajbhandari et al. 2020,
    arXiv:1910.02054, section 7).

    copies: one all-reduce of the gradients in float32. shard: for each micro-batch the blocks' weights in
    bf16 are gathered for the forward and for the backward pass, the root's in float32 once, and all gradients
    are reduced and scattered in float32. tensor: for each layer and micro-batch two all-reduces of s b D bf16
    numbers forward and two backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3), and two more when the
    forward pass is repeated.
    """
    shape, blocks, root = (
        setup.shape,
        block_parameters(setup.shape) / setup.tensor,
        root_parameters(setup.shape),
    )
    passes = setup.micro_batches

    def ring(n: int) -> float:
        return (n - 1) / n

    gathered = passes * ring(setup.shard) * (2 * 2 * blocks + 4 * root + 4 * (blocks + root))
    numbers = shape.context * setup.micro_batch * shape.width
    products = passes * shape.layers * (6 if setup.recompute else 4) * 2 * ring(setup.tensor) * 2 * numbers
    return {
        "copies": 2 * ring(setup.copies) * 4 * (blocks + root) / setup.shard,
        "shard": gathered,
        "tensor": products,
    }


def step_flop(setup: Setup) -> float:
    """Per optimiser step, all processes: 6 N + 12 L H Q s a token (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B), 8 and 16 with recomputation of the forward pass."""
    shape = setup.shape
    parameters = block_parameters(shape) + shape.vocab_size * shape.width
    attention = 2 * shape.layers * shape.heads * shape.head_dim * shape.context
    return setup.batch_tokens * (8 if setup.recompute else 6) * (parameters + attention)


def seconds(setup: Setup, machine: Machine) -> dict[str, float]:
    """Seconds per optimiser step: products at the assumed utilisation, and each kind of traffic over the wire
    it must use: inside a machine while the group fits there, else between machines. Traffic of `shard` and
    `copies` can hide behind products; that of `tensor` cannot."""
    wires = {
        "tensor": machine.inside if setup.tensor <= machine.per_machine else machine.between,
        "shard": machine.inside if setup.shard * setup.tensor <= machine.per_machine else machine.between,
        "copies": machine.inside if setup.processes <= machine.per_machine else machine.between,
    }
    found = {"products": step_flop(setup) / setup.processes / (machine.flop * machine.utilisation)}
    return found | {kind: sent / wires[kind] for kind, sent in traffic(setup).items()}


def _preset(name: str) -> GPTConfig:
    return GPTConfig.preset(name)


SETUPS = (
    Setup("124M, ddp x 8", _preset("gpt2"), 524_288, 16, copies=8),
    Setup("1.5B, ddp x 8", _preset("gpt2-xl"), 1_048_576, 4, copies=8),
    Setup("1.5B, fsdp x 8", _preset("gpt2-xl"), 1_048_576, 8, shard=8),
    Setup("1.5B, fsdp x 8, recompute", _preset("gpt2-xl"), 1_048_576, 32, shard=8, recompute=True),
    Setup("13B, fsdp x 64", _preset("gpt3-13b"), 2_097_152, 4, shard=64, recompute=True),
    Setup("13B, hsdp 8 x 8", _preset("gpt3-13b"), 2_097_152, 4, copies=8, shard=8, recompute=True),
    Setup("175B, fsdp x 1024", _preset("gpt3-175b"), 3_145_728, 1, shard=1024, recompute=True),
    Setup("175B, tp 8, fsdp x 128", _preset("gpt3-175b"), 3_145_728, 4, shard=128, tensor=8, recompute=True),
    Setup("175B, tp 8, fsdp x 256", _preset("gpt3-175b"), 3_145_728, 6, shard=256, tensor=8, recompute=True),
)
"""What the tables show. Batch of 175B: 3.2 million tokens (Brown et al. 2020, table 2.1), here a power-of-two
near it."""


def memory_table(machine: Machine) -> str:
    """Gigabytes per process."""
    lines = [
        "| model, plan | kept | together | activations | logits | sum (GB) | fits 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for setup in SETUPS:
        parts = memory(setup)
        total = sum(parts.values())
        cells = " | ".join(f"{value / 1e9:.1f}" for value in (*parts.values(), total))
        lines.append(
            f"| {setup.name}, micro-batch {setup.micro_batch} | {cells} | "
            f"{'yes' if total < 0.9 * machine.memory else 'no'} |"
        )
    return "\n".join(lines)


def time_table(machine: Machine) -> str:
    """Gigabytes sent per process, and seconds, per optimiser step."""
    lines = [
        "| model, plan | micro-batches | sent (GB): copies | shard | tensor | products (s) | copies (s) | "
        "shard (s) | tensor (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setup in SETUPS:
        sent, took = traffic(setup), seconds(setup, machine)
        cells = [f"{sent[kind] / 1e9:.1f}" for kind in ("copies", "shard", "tensor")]
        cells += [f"{took[kind]:.2f}" for kind in ("products", "copies", "shard", "tensor")]
        lines.append(f"| {setup.name} | {setup.micro_batches} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its tables computed anew."""
    for name, table in (("memory", memory_table(Machine())), ("time", time_table(Machine()))):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        page, count = re.subn(
            pattern, lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}")
    return page


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if before == after else f"{PAGE} is out of date: python scripts/write_scaling_docs.py")
    PAGE.write_text(after, encoding="utf-8")
