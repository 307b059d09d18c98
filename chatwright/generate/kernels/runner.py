"""The runner of the CPU kernels: paged keys and values, a team of threads, one compiled call per step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.kernels import packing, paths, step
from chatwright.generate.kernels.simd import GROUP, LANES, SYNC_SIZE
from chatwright.generate.runner import Feed
from chatwright.model.gpt import GPT

ROWS = 256
"""Tokens that one compiled call takes at most; more go in several."""


class Team:
    """Threads that run one compiled function together; the caller is the first of them.

    The function must release Python's lock (nogil), or the threads would wait for each other for ever.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._job: Callable[[int], Any] | None = None
        self._start = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._done = threading.Semaphore(0)
        self._helpers = [
            threading.Thread(target=self._help, args=(number,), name=f"chatwright-kernel-{number}", daemon=True)
            for number in range(1, threads)
        ]
        for helper in self._helpers:
            helper.start()

    def run(self, job: Callable[[int], Any]) -> None:
        """job(0) here and job(1), job(2), ... in the others; back when all are done."""
        self._job = job
        for start in self._start:
            start.release()
        job(0)
        for _ in self._start:
            self._done.acquire()

    def close(self) -> None:
        """Let the helpers go."""
        self._job = None
        for start in self._start:
            start.release()

    def _help(self, number: int) -> None:
        while True:
            self._start[number - 1].acquire()
            if self._job is None:
                return
            self._job(number)
            self._done.release()


class KernelRunner:
    """Runs a model on this machine's CPU with packed weights.

    dtype: fp32, bf16, int8 or int4, of the weights; activations are float32, and rounded to int8 in groups of 32 before they meet
    integer weights. Keys and values are bfloat16, float32 with fp32 weights. Raises UserError for shapes the kernels lack.
    """

    def __init__(self, model: GPT, dtype: str = "bf16", *, threads: int = 0, path: str | None = None) -> None:
        self.config = model.config
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.path = path or paths.choose()
        self.packed = packing.pack(model, dtype)
        self._angles = model.angles
        self.team = Team(threads or torch.get_num_threads())
        self._dims = self._describe()
        self._buffers(ROWS)
        self._pages = 0

    def described(self) -> str:
        """One line for people: instructions, threads, weights."""
        size = self.packed.weight_bytes() / 1e6
        return f"{paths.described(self.path, self.team.threads)}, {self.dtype} weights ({size:,.0f} MB)"

    def close(self) -> None:
        """End the threads."""
        self.team.close()

    def _describe(self) -> np.ndarray:
        config = self.config
        dims = np.zeros(step.DIMS, dtype=np.int64)
        head_stride = packing.up_to(config.head_dim, GROUP)
        qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
        activation = {"swiglu": step.SWIGLU, "gelu_tanh": step.GELU_TANH, "relu2": step.RELU2}[config.activation]
        for place, value in (
            (step.WIDTH, config.width),
            (step.STRIDE, packing.up_to(config.width, GROUP)),
            (step.LAYERS, config.layers),
            (step.HEADS, config.heads),
            (step.KV_HEADS, config.kv_heads),
            (step.HEAD_DIM, config.head_dim),
            (step.HEAD_STRIDE, head_stride),
            (step.MLP_STRIDE, packing.up_to(config.mlp_width, GROUP)),
            (step.QKV_STRIDE, packing.up_to(qkv, LANES)),
            (step.LOGIT_STRIDE, packing.up_to(config.vocab_size, LANES)),
            (step.NORM, step.RMS if config.norm == "rms" else step.LAYER),
            (step.ACTIVATION, activation),
            (step.QK_NORM, int(config.qk_norm)),
            (step.ROTARY, int(config.position == "rotary")),
            (step.BF16_CACHE, int(self.dtype != "fp32")),
        ):
            dims[place] = value
        return dims

    def _buffers(self, rows: int) -> None:
        """What the kernels write between products; padding stays zero."""
        dims, threads = self._dims, self.team.threads
        attended = int(dims[step.HEADS] * dims[step.HEAD_STRIDE])
        widest = max(int(dims[step.STRIDE]), attended, int(dims[step.MLP_STRIDE]))
        up = int(self.packed.plan[step.UP, 4]) * LANES

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, dtype=np.float32)

        self._x = zeros(rows * int(dims[step.STRIDE]))
        self._normed = zeros(threads, rows * int(dims[step.STRIDE]))
        self._words = np.zeros((threads, rows * widest), dtype=np.uint8)
        self._factors = zeros(threads, rows * widest // GROUP)
        self._sums = zeros(threads, rows * widest // GROUP)
        self._qkv = zeros(rows * int(dims[step.QKV_STRIDE]) + GROUP)
        self._attended = zeros(rows * attended)
        self._raw = zeros(rows * up)
        self._hidden = zeros(rows * int(dims[step.MLP_STRIDE]))
        self._scores = zeros(threads, packing.up_to(self.config.context, LANES))
        self._every = np.arange(rows, dtype=np.int64)
        self._sync = np.zeros(SYNC_SIZE, dtype=np.int64)

    def token_bytes(self) -> int:
        """Memory of a token's keys and values."""
        item = 2 if self._dims[step.BF16_CACHE] else 4
        return int(2 * self.config.layers * self.config.kv_heads * self._dims[step.HEAD_STRIDE] * item)

    def allocate(self, pages: int, size: int) -> None:
        """Room for `pages` pages. Raises UserError for a page size other than the kernels'."""
        if size != LANES:
            raise UserError(f"the CPU kernels have pages of {LANES} tokens, not {size}")
        self._pages = pages
        self._dims[step.PAGES] = pages
        half = pages * size * self.token_bytes() // 2
        # Untouched memory costs nothing, and numbers that were never written are never read.
        self._keys, self._values = np.empty(half, dtype=np.uint8), np.empty(half, dtype=np.uint8)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        for memory in (self._keys, self._values):
            pages = memory.reshape(self.config.layers, self._pages, -1)
            pages[:, target] = pages[:, source]

    def forward(self, feeds: Sequence[Feed]) -> Float[Tensor, "wanted vocab"]:
        """Logits behind the wanted tokens; see `Runner`."""
        ids = np.concatenate([np.asarray(feed.ids, dtype=np.int64) for feed in feeds])
        positions = np.concatenate([np.arange(feed.start, feed.start + len(feed.ids)) for feed in feeds])
        most = max(len(feed.pages) for feed in feeds)
        pages = np.zeros((len(ids), most), dtype=np.int64)
        wanted, at = [], 0
        for feed in feeds:
            pages[at : at + len(feed.ids), : len(feed.pages)] = feed.pages
            at += len(feed.ids)
            wanted.append(np.arange(at - feed.wanted, at))
        asked = np.concatenate(wanted)
        logits = torch.empty(len(asked), int(self._dims[step.LOGIT_STRIDE]))
        # In order: the tokens of a sequence that are cut apart find their predecessors stored.
        for start in range(0, len(ids), ROWS):
            end = min(start + ROWS, len(ids))
            here = (asked >= start) & (asked < end)
            out = logits[torch.from_numpy(np.flatnonzero(here))] if not here.all() else logits
            self._rows(ids[start:end], positions[start:end], pages[start:end], asked[here] - start, out)
            if out is not logits:
                logits[torch.from_numpy(np.flatnonzero(here))] = out
        return logits[:, : self.config.vocab_size]

    def _rows(self, ids: np.ndarray, positions: np.ndarray, pages: np.ndarray, wanted: np.ndarray, logits: Tensor) -> None:
        """One compiled call: up to ROWS tokens."""
        count, where = len(ids), torch.from_numpy(positions)
        embedded = self.packed.embed(torch.from_numpy(ids))
        if self.packed.positions is not None:
            embedded = embedded + self.packed.positions[where]
        stride = int(self._dims[step.STRIDE])
        self._x[: count * stride].reshape(count, stride)[:, : self.config.width] = embedded.numpy()
        angles = self._angles(where[None])
        cos, sin = (part.flatten().contiguous().numpy() for part in angles) if angles else (self._factors[0], self._factors[0])
        flat = logits.view(-1).numpy()
        wanted = np.ascontiguousarray(wanted)
        typed, threads = paths.typed(self.path), self.team.threads
        packed, eps = self.packed, np.float32(self.config.norm_eps)

        def job(thread: int) -> None:
            step.forward(
                typed, thread, threads, self._sync, self._dims, eps, packed.arena, packed.plan, packed.vectors, packed.norms,
                count, self._every, wanted, self._x, self._normed, self._words, self._factors, self._sums, self._qkv,
                self._attended, self._raw, self._hidden, self._scores, cos, sin, positions, pages, self._keys,
                self._values, flat,
            )  # fmt: skip

        self.team.run(job)
