"""Blocks as compiled functions, for stages in which every batch has another number of tokens.

Pre-training compiles its whole step for one shape (pretrain.py::fast_step). Conversations and answers have ever new lengths; here only
the blocks are compiled, with sizes left open, and the same few graphs serve all blocks of all models of a stage. What it gains and
costs: docs/performance.md.
"""

from __future__ import annotations

from types import MethodType

from torch import nn

from chatwright import runtime
from chatwright.model.gpt import Block

GRAPHS = 64
"""Forms of a block that one process may compile: with gradients or without, frozen or trained, packed, padded or neither, some
places or all. torch's own limit is 8, beyond which it silently compiles no more."""


def compile_blocks(*models: nn.Module | None) -> str:
    """Compile the blocks of these models where that works; a line that says whether it does, and why not. Results are the same up to
    rounding. Copies made afterwards are compiled as well."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    forward, line = runtime.compile_function(Block.forward, sizes_change=True)
    blocks = [module for model in models if model is not None for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.forward = MethodType(forward, block)  # type: ignore[method-assign]  # bound: a deep copy has its own block's
        block.mlp.written_out = line == "compile: on" and runtime.device().type == "cpu"
    return f"{line}, block by block: the first steps wait for the compiler" if line == "compile: on" else line
