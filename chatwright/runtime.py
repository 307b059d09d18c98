"""The machine: device, precision, threads, memory allocator, ranks, seeds.

Only this file asks for CUDA or the rank. Everything works on a laptop's CPU and under torchrun on GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatwright import openmp
from chatwright.config import UserError


def device() -> torch.device:
    """The GPU of this rank where CUDA is available, else the CPU. CHATWRIGHT_DEVICE overrides it ("cpu",
    "cuda:1")."""
    asked = os.environ.get("CHATWRIGHT_DEVICE")
    if asked:
        try:
            return torch.device(asked)
        except RuntimeError:
            raise UserError(f"CHATWRIGHT_DEVICE={asked} is not a device; try cpu or cuda:0") from None
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


Moved = TypeVar("Moved")


def on_device(value: Moved) -> Moved:
    """A tensor, or a dataclass of tensors (nested ones too), on this rank's device; on a CPU the very same
    object."""
    target: Any = device()
    if target.type == "cpu":
        return value
    if isinstance(value, Tensor):
        # Only copies from pinned memory run in the background.
        pinned = value.pin_memory() if value.device.type == "cpu" else value
        return cast("Moved", pinned.to(target, non_blocking=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{field.name: on_device(getattr(value, field.name)) for field in dataclasses.fields(value)},
        )
    return value


def rank() -> int:
    """This process's number among all; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


_groups: dict[str, Any] = {}


def join() -> None:
    """Join the process group of the processes that torchrun started. Does nothing for a single process, or
    when called again.

    Tensors travel by NCCL between GPUs and by gloo between CPUs. Two further gloo groups are for small
    agreements and for checkpoints that are written in the background. Each needs its own group, so that
    neither receives the other's messages. Their timeout is long: rank zero may be busy with a stage in which
    the others have no part.
    """
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    from chatwright.rendezvous import fresh_store

    store, number, count = fresh_store()
    if device().type == "cuda":
        torch.cuda.set_device(device())
        backend, gpu = "cpu:gloo,cuda:nccl", device()
        dist.init_process_group(backend, store=store, rank=number, world_size=count, device_id=gpu)
    else:
        dist.init_process_group("gloo", store=store, rank=number, world_size=count)
    for name in ("agreeing", "saving"):
        _groups[name] = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))


def group(name: str) -> Any:
    """The process group `agreeing` or `saving`, both on CPUs; None for a single process."""
    return _groups.get(name)


def leave() -> None:
    """Leave the process group that `join` joined."""
    import torch.distributed as dist

    if _groups:
        _groups.clear()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has called this; does nothing for a single process."""
    if _groups:
        import torch.distributed as dist

        dist.barrier(group=group("agreeing"))


Said = TypeVar("Said")


def broadcast_from_rank0(make: Callable[[], Said]) -> Said:
    """Call `make` in rank zero only; returns its result in every process.

    A UserError of `make` is raised in every process.
    """
    if not _groups:
        return make()
    import torch.distributed as dist

    said: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_rank_zero():
        try:
            said[0] = make()
        except UserError as error:
            failure, said[1] = error, str(error)
    dist.broadcast_object_list(said, src=0, group=group("agreeing"))  # pickled between our own processes
    if said[1] is not None:
        raise failure or UserError(said[1])
    return cast("Said", said[0])


def set_threads(threads: int = 0) -> int:
    """Let torch use `threads` CPU threads (0: the cores this process may run on); returns the number."""
    if threads <= 0:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = int(asked) if asked.isdigit() and int(asked) > 0 else available
    torch.set_num_threads(threads)
    openmp.watch(alike=local_world_size())
    return threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the context, torch's operations on the CPU run in the calling thread alone. Where OpenMP cannot
    be called, nothing changes.

    After a parallel operation torch's other threads spin for milliseconds, waiting for the next one
    (openmp.py). They keep processors busy that threads outside of
    torch need. OpenMP's number of threads belongs to the calling thread. `torch.set_num_threads` would also
    set the default of new threads: a thread that first used torch inside the context would keep a single
    thread for ever.
    """
    # `get_num_threads` must come first: torch sets this thread's number once, at the first such call.
    threads, library = torch.get_num_threads(), openmp.library()
    if library is None:
        yield
        return
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(threads)


def has_bf16() -> bool:
    """Whether the hardware computes bf16 products without emulation. CHATWRIGHT_BF16=0 makes this False."""
    if os.environ.get("CHATWRIGHT_BF16") == "0":
        return False
    if device().type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return _arm_bf16()


def _arm_bf16() -> bool:
    """Arm CPUs announce bf16 in /proc/cpuinfo on Linux; elsewhere (macOS) float32 is the safe answer."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return " bf16" in file.read()
    return False


def compute_dtype(precision: str = "auto") -> torch.dtype:
    """float32 or bfloat16 for the matrix products of training. `auto`: bf16 where the hardware has it."""
    choices = {
        "auto": torch.bfloat16 if has_bf16() else torch.float32,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
    }
    if precision not in choices:
        raise UserError(f"precision {precision!r} is none of {', '.join(choices)}")
    return choices[precision]


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `dtype` inside the context; float32 changes nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype=dtype)


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Matrix products in their operands' own precision inside the context, even under `autocast`."""
    return torch.autocast(device().type, enabled=False)


@functools.cache
def _mkl_holds_back() -> bool:
    """Whether torch uses MKL on an AMD processor with AVX-512: there MKL uses AVX2 at most."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not both or not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.cpu._is_avx512_supported():
        return False
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return "AuthenticAMD" in file.read()
    return False


@torch.no_grad()
def product(x: Float[Tensor, "*N K"], weight: Float[Tensor, "M K"]) -> Float[Tensor, "*N M"]:
    """x @ weight.T, without a gradient, by the library that is fastest on this processor.

    torch computes float32 products with MKL and bfloat16 ones with oneDNN. Where MKL holds back
    (`_mkl_holds_back`), oneDNN is 2.1 times as fast in float32 (Zen 5: 429 and 204 GFLOP/s). The choice
    depends on the machine alone, so that a resumed run gets the same bits.
    """
    plain = {type(x), type(weight)} <= {Tensor, nn.Parameter} and not torch.is_autocast_enabled(x.device.type)
    if plain and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _mkl_holds_back():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]
    return x @ weight.mT


@functools.lru_cache
def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of this process's device at the product of two square matrices, the best of several: `mfu` is
    relative to it.

    It is measured for 0.2 s, once per process. Other programs that run meanwhile make it smaller, and `mfu`
    larger.
    """
    size, where = (8192, device()) if device().type == "cuda" else (1024, device())
    draw = generator("peak")
    left, right = (torch.randn(size, size, generator=draw).to(where, dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.2 or best == float("inf"):
        synchronise()
        started = time.perf_counter()
        torch.mm(left, right)
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronise() -> None:
    """Wait until the GPU has finished its queued work; does nothing on a CPU."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())


def seed_for(*parts: object) -> int:
    """A 63-bit seed from names and numbers, the same on every machine: seed_for(1337, "ppo", step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A separate CPU random stream, seeded by names and numbers (`seed_for`)."""
    return torch.Generator().manual_seed(seed_for(*parts))


def rng_state() -> Tensor:
    """The state of torch's global random stream for checkpoints (uint8), followed by the GPU's if there is
    one."""
    if device().type == "cuda":
        return torch.cat((torch.get_rng_state(), torch.cuda.get_rng_state(device())))
    return torch.get_rng_state()


def set_rng_state(state: Tensor) -> None:
    """Restore a state from `rng_state`; a checkpoint from a CPU leaves the GPU's stream as it is."""
    state = state.cpu()
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device().type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone(), device())


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside the context; each model's mode is restored afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def describe() -> dict[str, Any]:
    """The parts of the environment on which a run's numbers depend; written into each run's state."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "device": str(device()),
        "threads": torch.get_num_threads(),
        "bf16": has_bf16(),
        "processes": world_size(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
