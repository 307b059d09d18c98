"""The runner of the CPU kernels: paged keys and values, a team of threads, one compiled call per step."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatwright import runtime
from chatwright.config import UserError
from chatwright.generate.kernels import layout, packing, paths, step
from chatwright.generate.kernels.barrier import SYNC_SIZE
from chatwright.generate.kernels.dots import GROUP
from chatwright.generate.kernels.simd import LANES
from chatwright.generate.runner import Feed
from chatwright.machine_load import LoadMeter, threads_beside
from chatwright.model.gpt import GPT

_ACTIVATIONS = {
    "swiglu": layout.SWIGLU,
    "gelu_tanh": layout.GELU_TANH,
    "relu2": layout.RELU2,
    "geglu": layout.GEGLU,
    "gelu": layout.GELU,
}
ROWS = 256
"""Tokens that one compiled call takes at most; more go in several."""


class Team:
    """Threads that run one compiled function together; the caller is the first of them.

    The function must release Python's lock (nogil), or the threads would wait for each other for ever.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._job: Callable[[int], Any] | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self._start = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._done = threading.Semaphore(0)
        self._one_at_a_time = threading.Lock()
        for number in range(1, threads):
            name = f"chatwright-kernel-{number}"
            threading.Thread(target=self._help, args=(number,), name=name, daemon=True).start()

    def run(self, job: Callable[[int], Any], threads: int = 0) -> None:
        """job(0) here and job(1), job(2), ... in the others, so many `threads` of the team (0: all).

        Back when all are done. Raises what a job raised.
        """
        helpers = self._start[: (threads or self.threads) - 1]
        with self._one_at_a_time:
            self._job, self._failure = job, None
            for start in helpers:
                start.release()
            try:
                job(0)
            finally:  # an interrupted caller too leaves no helper behind in work that is not his any more
                for _ in helpers:
                    self._done.acquire()
                self._job = None  # it holds on to all weights
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Let the helpers go."""
        self._closed = True
        for start in self._start:
            start.release()

    def _help(self, number: int) -> None:
        while True:
            self._start[number - 1].acquire()
            if self._closed:
                return
            assert self._job is not None
            try:
                self._job(number)
            except BaseException as error:
                self._failure = error
            self._done.release()


def _flattened(feeds: Sequence[Feed]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of all new tokens: ids, positions, pages of their sequence (padded with 0), and the numbers of those
    wanted."""
    count = sum(len(feed.ids) for feed in feeds)
    ids, positions = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    pages = np.zeros((count, max(len(feed.pages) for feed in feeds)), dtype=np.int64)
    wanted: list[int] = []
    at = 0
    for feed in feeds:
        end = at + len(feed.ids)
        ids[at:end] = feed.ids
        positions[at:end] = range(feed.start, feed.start + len(feed.ids))
        pages[at:end, : len(feed.pages)] = feed.pages
        wanted.extend(range(end - feed.wanted, end))
        at = end
    return ids, positions, pages, np.array(wanted, dtype=np.int64)


_compiled: set[str] = set()
SOON = 2.0
"""Seconds after which people are told what they wait for: what lies compiled on the disk is read in half a
second."""


def _tell(text: str) -> None:
    """To the error output: the other one may be the text that is generated."""
    print(text, file=sys.stderr, flush=True)


def _compile_once(path: str) -> None:
    """Have the step compiled, or read from the disk."""
    if path in _compiled:
        return
    note = threading.Timer(
        SOON, _tell, ["compiling the CPU kernels for this machine: once, about ten seconds"]
    )
    note.daemon = True
    note.start()
    try:
        step.compile_for(paths.typed(path))
        _compiled.add(path)
    finally:
        note.cancel()


class KernelRunner:
    """Runs a model on this machine's CPU with packed weights.

    dtype: fp32, bf16, int8 or int4, of the weights; activations are float32, and rounded to whole numbers in
    groups of 32 before they meet integer weights (int16 for int8, int8 for int4). Keys and values are
    bfloat16, float32 with fp32 weights. Raises UserError for shapes the kernels lack.

    threads: 0 takes those of torch, and fewer while other programs keep processors busy (`working`). The
    numbers are the same with any count.
    """

    own_threads = True

    def __init__(self, model: GPT, dtype: str = "bf16", *, threads: int = 0, path: str | None = None) -> None:
        self.config = model.config
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.path = path or paths.choose()
        # Compiling and packing take seconds each, and different processors can do them.
        compiling = threading.Thread(target=_compile_once, args=(self.path,), daemon=True)
        compiling.start()
        self.packed = packing.pack(model, dtype)
        compiling.join()
        self._angles = model.angles
        self._cos = self._sin = np.zeros(1, dtype=np.float32)
        self._turned = 0  # positions that they hold
        self.team = Team(threads or torch.get_num_threads())
        self._load = None if threads else LoadMeter(alike=runtime.local_world_size())
        weakref.finalize(self, self.team.close)  # the threads end when nobody has the runner any more
        self._dims, self._numbers = self._describe(), self._describe_numbers()
        self._buffers(ROWS)
        self._pages = 0

    def working(self) -> int:
        """Threads of the team to compute with now.

        The threads meet many times in a token, and each meeting takes as long as the last one needs to come.
        Where another program has its processor, that is a hundred times as long as the work between. With
        one thread fewer nobody waits.
        """
        if self._load is None:
            return self.team.threads
        return threads_beside(self._load.look(), threads=self.team.threads, count=self._load.count)

    def described(self) -> str:
        """One line for people: instructions, threads, weights."""
        size = self.packed.weight_bytes() / 1e6
        return f"{paths.described(self.path, self.team.threads)}, {self.dtype} weights ({size:,.0f} MB)"

    def _describe(self) -> np.ndarray:
        config = self.config
        dims = np.zeros(layout.DIMS, dtype=np.int64)
        qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
        qk_norm = layout.HEAD_QK_NORM if config.qk_norm else layout.NO_QK_NORM
        for place, value in (
            (layout.WIDTH, config.width),
            (layout.STRIDE, packing.up_to(config.width, GROUP)),
            (layout.LAYERS, config.layers),
            (layout.HEADS, config.heads),
            (layout.KV_HEADS, config.kv_heads),
            (layout.HEAD_DIM, config.head_dim),
            (layout.HEAD_STRIDE, packing.up_to(config.head_dim, GROUP)),
            (layout.MLP_STRIDE, packing.up_to(config.mlp_width, GROUP)),
            (layout.QKV_STRIDE, packing.up_to(qkv, LANES)),
            (layout.LOGIT_STRIDE, packing.up_to(config.vocab_size, LANES)),
            (layout.NORM, layout.RMS if config.norm == "rms" else layout.LAYER),
            (layout.ACTIVATION, _ACTIVATIONS[config.activation]),
            (layout.QK_NORM, layout.WHOLE_QK_NORM if config.qk_norm_whole else qk_norm),
            (layout.PAIRS, config.rotated // 2 if config.position == "rotary" else 0),
            (layout.BF16_CACHE, int(self.dtype != "fp32")),
            (layout.POSITIONS, self.packed.positions),
            (layout.PARALLEL, int(config.parallel)),
        ):
            dims[place] = value
        return dims

    def _describe_numbers(self) -> np.ndarray:
        config = self.config
        numbers = np.zeros(layout.NUMBERS, dtype=np.float32)
        usual = np.float32(1.0) / np.sqrt(np.float32(config.head_dim))
        for place, value in (
            (layout.EPS, config.norm_eps),
            (layout.EMBED_SCALE, config.embed_scale),
            (layout.SCORE_SCALE, config.attention_scale or usual),
            (layout.SCORE_CAP, config.attention_softcap),
            # Where a norm stands behind a branch, that has the factor.
            (layout.BRANCH_SCALE, config.residual_scale if config.branch_norm == "before" else 1.0),
            (layout.LOGIT_CAP, config.logit_softcap),
        ):
            numbers[place] = value
        return numbers

    def _buffers(self, rows: int) -> None:
        """What the kernels write between products; padding stays zero."""
        dims, threads = self._dims, self.team.threads
        attended = int(dims[layout.HEADS] * dims[layout.HEAD_STRIDE])
        widest = max(int(dims[layout.STRIDE]), attended, int(dims[layout.MLP_STRIDE]))
        up = int(self.packed.plan[layout.UP, 4]) * LANES

        def zeros(*shape: int) -> np.ndarray:
            made = packing.on_boundary(4 * math.prod(shape)).view(np.float32).reshape(shape)
            made.fill(0.0)
            return made

        self._x = zeros(rows * int(dims[layout.STRIDE]))
        self._normed = zeros(threads, rows * int(dims[layout.STRIDE]))
        self._words = zeros(threads, rows * widest // 2).view(np.uint8)  # up to two bytes each
        self._factors = zeros(threads, rows * widest // GROUP)
        self._sums = zeros(threads, rows * widest // GROUP)
        self._qkv = zeros(rows * int(dims[layout.QKV_STRIDE]) + GROUP)
        self._attended = zeros(rows * attended)
        self._raw = zeros(rows * up)
        self._hidden = zeros(rows * int(dims[layout.MLP_STRIDE]))
        self._every = np.arange(rows, dtype=np.int64)
        self._sync = np.zeros(SYNC_SIZE, dtype=np.int64)

    def token_bytes(self) -> int:
        """Memory of a token's keys and values."""
        item = 2 if self._dims[layout.BF16_CACHE] else 4
        return int(2 * self.config.layers * self.config.kv_heads * self._dims[layout.HEAD_STRIDE] * item)

    def weight_bytes(self) -> int:
        """The packed weights, which lie beside the model's parameters."""
        packed = self.packed
        return int(packed.arena.nbytes + packed.vectors.nbytes + packed.blocks.nbytes)

    def allocate(self, pages: int, size: int) -> None:
        """Room for `pages` pages. Raises UserError for a page size other than the kernels', or without the
        memory."""
        if size != LANES:
            raise UserError(f"the CPU kernels have pages of {LANES} tokens, not {size}")
        self._pages = pages
        self._dims[layout.PAGES] = pages
        half = pages * size * self.token_bytes() // 2
        try:
            # Untouched memory costs nothing, and numbers that were never written are never read.
            self._keys, self._values = packing.on_boundary(half), packing.on_boundary(half)
            self._scores = np.zeros(
                (self.team.threads, pages * size), dtype=np.float32
            )  # no sequence is longer
        except (MemoryError, ValueError):
            raise UserError(
                f"there is no memory for a key-value cache of {pages * size} tokens ({2 * half / 2**20:.0f} "
                "MiB); lower cache_tokens"
            ) from None

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        for memory in (self._keys, self._values):
            pages = memory.reshape(self.config.layers, self._pages, -1)
            pages[:, target] = pages[:, source]

    def forward(self, feeds: Sequence[Feed]) -> Float[Tensor, "wanted vocab"]:
        """Logits behind the wanted tokens; see `Runner`."""
        ids, positions, pages, asked = _flattened(feeds)
        logits = np.empty((len(asked), int(self._dims[layout.LOGIT_STRIDE])), dtype=np.float32)
        # In order: the tokens of a sequence that are cut apart find their predecessors stored.
        for start in range(0, len(ids), ROWS):
            end = min(start + ROWS, len(ids))
            first, last = np.searchsorted(asked, (start, end))
            part = logits[first:last].reshape(-1)
            self._rows(
                ids[start:end], positions[start:end], pages[start:end], asked[first:last] - start, part
            )
        return torch.from_numpy(logits)[:, : self.config.vocab_size]

    def _turn(self, longest: int) -> None:
        """Have the rotary angles of positions below `longest`."""
        if longest <= self._turned or self.config.position != "rotary":
            return
        self._turned = packing.up_to(longest, 1024)
        angles = self._angles(torch.arange(self._turned)[None])
        assert angles is not None  # cosines and sines, of one or two tables
        self._cos, self._sin = (
            torch.cat([part.flatten() for part in angles[which::2]]).numpy() for which in range(2)
        )
        self._dims[layout.ANGLE_ROWS] = self._turned

    def _rows(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        pages: np.ndarray,
        wanted: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        """One compiled call: up to ROWS tokens."""
        self._turn(int(positions.max()) + 1)
        path, threads = paths.typed(self.path), self.working()
        packed = self.packed

        def job(thread: int) -> None:
            step.forward(
                path,
                thread,
                threads,
                self._sync,
                self._dims,
                self._numbers,
                packed.arena,
                packed.plan,
                packed.vectors,
                packed.blocks,
                ids,
                positions,
                pages,
                wanted,
                self._every,
                self._x,
                self._normed,
                self._words,
                self._factors,
                self._sums,
                self._qkv,
                self._attended,
                self._raw,
                self._hidden,
                self._scores,
                self._cos,
                self._sin,
                self._keys,
                self._values,
                logits,
            )

        self.team.run(job, threads)
