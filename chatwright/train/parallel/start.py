"""The processes of a run: met at its start, arranged by the plan, left at its end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping

from chatwright import runtime
from chatwright.config import UsageError, UserError
from chatwright.metrics import console
from chatwright.model.config import GPTConfig
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelConfig, ParallelContext, arrange, check
from chatwright.train.parallel.multi_process import MultiProcess

PATIENCE = 5.0
"""Seconds for which the first process may speak before the others."""


def start_parallel(
    config: ParallelConfig,
    *,
    batch_size: int,
    micro_batch: int = 0,
    shape: GPTConfig | None = None,
    precision: str = "auto",
    compile_blocks: bool = False,
    named: str = "batch_size",
    refused: Mapping[str, str] | None = None,
) -> ParallelContext:
    """The processes of this run, arranged by the plan. `refused` are plans that the stage cannot use, and
    why. Raises UsageError, in every process, when it cannot be."""
    if config.plan in (refused or {}):
        raise UsageError(f"parallel.plan {config.plan}: {(refused or {})[config.plan]}")
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or runtime.world_size() > 1
    if not under_torchrun:
        if config.plan != "auto":
            raise UsageError(
                f"parallel.plan {config.plan} needs processes that torchrun starts: "
                "torchrun --nproc-per-node 2 -m chatwright ... (docs/guide/many-processes.md)"
            )
        arrange(config, 1, 1)  # refuses settings of plans that are not chosen
        return SINGLE_PROCESS
    mesh_shape = arrange(config, runtime.world_size(), runtime.local_world_size())
    check(config, mesh_shape, batch_size=batch_size, micro_batch=micro_batch, shape=shape, named=named)
    if runtime.world_size() == 1:
        return SINGLE_PROCESS
    can_compile = compile_blocks and runtime.compiler_missing() is None
    return MultiProcess(mesh_shape, dtype=runtime.compute_dtype(precision), compile_blocks=can_compile)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Meet the processes that torchrun started, if it did, and part at the end. Only the first one speaks
    inside.

    An error in another one is told late: most are found by all, and torchrun ends the others when the first
    one ends.
    """
    before = console.quiet
    console.quiet = before or not runtime.is_rank_zero()
    try:
        runtime.join()
        yield
        runtime.leave()
    except UserError as error:
        if runtime.is_rank_zero():
            raise
        time.sleep(PATIENCE)
        raise type(error)(f"process {runtime.rank()}: {error}") from None
    finally:
        console.quiet = before
