"""The processes of a run: the process group, and their arrangement by the plan."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping

from chatwright import compiler, runtime
from chatwright.config import UsageError, UserError
from chatwright.metrics import console
from chatwright.model.config import GPTConfig
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelConfig, ParallelContext, arrange, check
from chatwright.train.parallel.multi_process import MultiProcess

PATIENCE = 5.0
"""Seconds that rank zero has to report an error before the others do."""


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
    """The processes of this run, arranged by the plan. `refused` maps plans that the stage cannot use to the
    reason. Raises UsageError, in every process, when the plan is impossible."""
    if config.plan in (refused or {}):
        raise UsageError(f"parallel.plan {config.plan}: {(refused or {})[config.plan]}")
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or runtime.world_size() > 1
    if not under_torchrun:
        if config.plan != "auto":
            raise UsageError(
                f"parallel.plan {config.plan} needs processes that torchrun starts: torchrun "
                "--nproc-per-node 2 -m chatwright ... (docs/guide/many-processes.md)"
            )
        arrange(config, 1, 1)  # raises for settings of plans that are not chosen
        return SINGLE_PROCESS
    mesh_shape = arrange(config, runtime.world_size(), runtime.local_world_size())
    check(config, mesh_shape, batch_size=batch_size, micro_batch=micro_batch, shape=shape, named=named)
    if runtime.world_size() == 1:
        return SINGLE_PROCESS
    can_compile = compile_blocks and compiler.compiler_missing() is None
    return MultiProcess(mesh_shape, dtype=runtime.compute_dtype(precision), compile_blocks=can_compile)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if torchrun started one, and leave it at the end. Only rank zero prints inside.

    Errors in other processes are raised after a delay (`PATIENCE`): most errors occur in all processes, and
    torchrun ends the others when the first one ends.
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
