"""Compiled blocks, for stages in which the number of tokens changes with every batch.

Pre-training compiles its whole step for one shape (pretrain.py::fast_step). The lengths of conversations and
answers vary. So here only the blocks are compiled, with dynamic sizes, and the same few graphs serve all
blocks of all models of a stage. docs/lab/performance.md has gains and costs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from chatwright import compiler, runtime
from chatwright.model.compile_friendly import use_sigmoid_gelu
from chatwright.model.gpt import Block
from chatwright.model.inputs import AttentionInput

GRAPHS = 64
"""Graphs of a block that one process may compile: with gradients or without, frozen or trained, packed,
padded or neither, some positions or all. torch's own limit is 8, beyond which it silently stops compiling."""


def compile_blocks(*models: nn.Module | None, cut: bool = False) -> str:
    """Compile the blocks of these models where that works; returns a line that says whether it does, or why
    not.

    Results are the same up to rounding. Later copies of the models are compiled as well. Blocks run
    uncompiled with a cache, as in sampling, and where products are `cut` (plan `tp`): torch 2.13 fails on
    those with dynamic sizes."""
    if cut:
        return "compile: off (torch's compiler fails on the cut products of tp); training runs, slower"
    compiled, line = compiler.compile_function(Block.forward, sizes_change=True)
    if line != "compile: on":
        return line
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)

    def forward(block: Block, x: Tensor, inputs: AttentionInput) -> Any:
        return (compiled if inputs.cache is None else Block.forward)(block, x, inputs)

    for module in (module for model in models if model is not None for module in model.modules()):
        if isinstance(module, Block):
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]  # bound: a deep copy has its own block's
            if runtime.device().type == "cpu":
                use_sigmoid_gelu(module)
    return f"{line}, block by block: the first steps wait for the compiler"
