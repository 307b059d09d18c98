"""The runner for every device and every shape: one forward pass of the torch model for many sequences.

A layer writes the new keys and values into their pages. Then it gathers each sequence's pages for torch's
attention, or adds to a contiguous copy of them (contiguous_cache.py). All indices are computed once per pass,
not once per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.contiguous_cache import ContiguousCache
from chatwright.generate.runner import Feed
from chatwright.model.cache import stored_mask
from chatwright.model.gpt import GPT
from chatwright.model.lora import active_adapter

PADDED = 16
"""Feeds up to this length share a pass, whatever their lengths: another pass costs more than the padding."""


class PagedCache:
    """The cache of `GPT.hidden` for one pass: rows whose keys and values lie in pages.

    keys, values: (layers, pages + 2, size, G, K). Padding writes into the first extra page. The second is all
    zeros and fills up rows with fewer pages than the longest. bench: contiguous copies of these rows, in this
    order.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, feeds: Sequence[Feed], bench: ContiguousCache | None = None
    ) -> None:
        self.keys, self.values, self.bench = keys, values, bench
        pages, size = keys.shape[1] - 2, keys.shape[2]
        tokens = max(len(feed.ids) for feed in feeds)
        ends = [feed.start + len(feed.ids) for feed in feeds]
        self.fresh = not any(feed.start for feed in feeds)
        self.span = max(ends)
        self.longest = self.span - tokens  # with the tokens of this pass, the longest row
        width = -(-self.span // size)
        table, slots = [], []
        for feed, end in zip(feeds, ends, strict=True):
            own = feed.pages[: -(-end // size)]
            table.append([*own, *[pages + 1] * (width - len(own))])
            slots.append([own[at // size] * size + at % size for at in range(feed.start, end)])
            slots[-1] += [pages * size] * (tokens - len(slots[-1]))
        device = keys.device
        self.lengths: Int[Tensor, " B"] = torch.tensor([feed.start for feed in feeds], device=device)
        self._table = torch.tensor(table, device=device).flatten()
        self._slots = torch.tensor(slots, device=device).flatten()
        self._column = self.lengths[:, None] + torch.arange(
            tokens, device=device
        )  # (B, T) positions of the new tokens
        if bench is not None:
            heads, room = bench.keys.shape[2:4]
            first = torch.arange(len(feeds) * heads, device=device).view(-1, heads, 1) * room
            self._on_bench = (first + self._column[:, None]).flatten()  # (B * G * T,)

    def extend(
        self, layer: int, keys: Float[Tensor, "B G T K"], values: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Store one layer's new keys and values; returns those of each row, old and new, padded to S, the
        length of the longest row."""
        self._store(self.keys[layer], keys)
        self._store(self.values[layer], values)
        if self.fresh:
            return keys, values
        if self.bench is not None:
            return self._add(self.bench.keys[layer], keys), self._add(self.bench.values[layer], values)
        return self._rows(self.keys[layer], keys), self._rows(self.values[layer], values)

    def _store(self, pages: Tensor, new: Tensor) -> None:
        pages.flatten(0, 1).index_copy_(0, self._slots, new.transpose(1, 2).flatten(0, 1).to(pages.dtype))

    def _rows(self, pages: Tensor, like: Tensor) -> Tensor:
        found = pages.index_select(0, self._table)  # (B * width, size, G, K)
        return found.view(like.shape[0], -1, *pages.shape[2:])[:, : self.span].transpose(1, 2).to(like.dtype)

    def _add(self, bench: Tensor, new: Tensor) -> Tensor:
        bench.flatten(0, 2).index_copy_(0, self._on_bench, new.flatten(0, 2).to(bench.dtype))
        return bench[: len(new), :, : self.span].to(new.dtype)

    def attention_mask(self, tokens: int, window: int = 0) -> Bool[Tensor, "B 1 T S"] | None:
        """True where a new token may attend: its own row up to itself, within the window. None: plain
        causal."""
        if self.fresh and not 0 < window < tokens:
            return None  # padding is on the right, where no real token attends
        return stored_mask(self._column, self.span, window)

    def advance(self, tokens: Tensor | int) -> None:
        """Does nothing: the scheduler counts."""


class TorchRunner:
    """A GPT that computes with paged keys and values (runner.py).

    The model may be used elsewhere between passes: its parameters are only read. A pass runs without dropout
    and restores the training mode of each module.
    """

    own_threads = False

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.embed.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.embed.weight.dtype

    def weights(self) -> tuple[object, ...]:
        """Identity of the weights: the parameters' addresses and version counters, and the active adapter."""
        places = ((at.data_ptr(), 0 if at.is_inference() else at._version) for at in self.model.parameters())
        return (active_adapter(self.model), *places)

    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        config = self.config
        return 2 * config.layers * config.kv_heads * config.head_dim * self._dtype.itemsize

    def weight_bytes(self) -> int:
        """0: it computes with the model's parameters."""
        return 0

    def allocate(self, pages: int, size: int) -> None:
        """Make room for `pages` pages of `size` tokens. Raises UserError when there is not so much memory."""
        config = self.config
        shape = (config.layers, pages + 2, size, config.kv_heads, config.head_dim)
        try:
            self._keys, self._values = (_zeros(shape, self._dtype, self.device) for _ in range(2))
        except (MemoryError, RuntimeError) as error:
            need = self.token_bytes() * (pages + 2) * size / 2**20
            raise UserError(
                f"there is no memory for a key-value cache of {pages * size} tokens ({need:.0f} MiB); lower "
                "cache_tokens"
            ) from error
        self._bench = ContiguousCache(
            (self._keys, self._values), lambda shape: _zeros(shape, self._dtype, self.device)
        )

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> Float[Tensor, "wanted vocab"]:
        """Store the keys and values of all new tokens; float32 logits of the wanted ones, in the feeds'
        order."""
        self._clean(feeds)
        parts, order = [], []
        try:
            with _evaluating(self.model):
                for group in _alike(feeds):
                    group, bench = self._arrange(feeds, group)
                    parts.append(self._pass([feeds[at] for at in group], bench))
                    order += group
                hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
                return self.model.head(hidden[_restored(feeds, order)]).float()  # type: ignore[no-any-return]
        except BaseException:
            self._bench.clear()  # it may count tokens that were not computed
            raise

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` a copy of page `source`, in all layers."""
        with torch.inference_mode():
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]
        self._bench.written([target])

    def _arrange(self, feeds: Sequence[Feed], group: list[int]) -> tuple[list[int], ContiguousCache | None]:
        """The order of a group in the contiguous cache, which is for decoding, not for prefill; or the group
        as it is, and None."""
        chosen = [feeds[at] for at in group]
        tokens = max(len(feed.ids) for feed in chosen)
        if tokens <= PADDED and all(feed.start for feed in chosen):
            order = self._bench.arrange(chosen, tokens)
            if order is not None:
                return [group[number] for number in order], self._bench
        size = self._keys.shape[2]
        self._bench.written(
            {
                page
                for feed in chosen
                for page in feed.pages[feed.start // size : (feed.start + len(feed.ids) - 1) // size + 1]
            }
        )
        return group, None

    def _pass(self, feeds: list[Feed], bench: ContiguousCache | None) -> Float[Tensor, "wanted D"]:
        lengths = [len(feed.ids) for feed in feeds]
        longest, device = max(lengths), self.device
        ids = torch.tensor([[*feed.ids, *[0] * (longest - len(feed.ids))] for feed in feeds], device=device)
        mask = None
        if min(lengths) < longest:
            mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(device)
        hidden = self.model.hidden(ids, mask=mask, cache=PagedCache(self._keys, self._values, feeds, bench))
        wanted = [
            row * longest + at
            for row, (feed, length) in enumerate(zip(feeds, lengths, strict=True))
            for at in range(length - feed.wanted, length)
        ]
        flat = hidden.flatten(0, 1)
        if len(wanted) == len(flat):
            return flat
        return flat[torch.tensor(wanted, dtype=torch.int64, device=device)]

    def _clean(self, feeds: Sequence[Feed]) -> None:
        """Zero new pages that are only partly filled. Attention reads what an earlier user left there with
        weight zero, and zero times NaN (after an overflow) is NaN: one request could spoil another."""
        size = self._keys.shape[2]
        begun = []
        for feed in feeds:
            end = feed.start + len(feed.ids)
            last = (end - 1) // size
            if last * size >= feed.start and end % size:
                begun.append(feed.pages[last])
        if begun:
            index = torch.tensor(begun, device=self.device)
            self._keys[:, index] = 0.0
            self._values[:, index] = 0.0


def _alike(feeds: Sequence[Feed]) -> list[list[int]]:
    """Groups of feeds for one pass each. In a group no feed is shorter than half of the longest, or all are
    at most PADDED."""
    lengths = [len(feed.ids) for feed in feeds]
    if max(lengths) <= max(PADDED, 2 * min(lengths)):
        return [list(range(len(feeds)))]
    groups: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(feeds)), key=lambda at: -lengths[at]):
        if not groups or longest > max(PADDED, 2 * lengths[at]):
            groups.append([])
            longest = lengths[at]
        groups[-1].append(at)
    return groups


def _restored(feeds: Sequence[Feed], order: Sequence[int]) -> slice | list[int]:
    """Indices that bring logit rows, computed for the feeds in `order`, back into the feeds' own order."""
    if all(at == number for number, at in enumerate(order)):
        return slice(None)
    ends = np.cumsum([feeds[at].wanted for at in order]).tolist()
    end_of = dict(zip(order, ends, strict=True))
    return [row for at, feed in enumerate(feeds) for row in range(end_of[at] - feed.wanted, end_of[at])]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take up memory only when they are written to: a cache is seldom full."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """No dropout inside; each module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
