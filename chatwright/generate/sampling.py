"""From logits to a token: greedy, temperature, top-k, top-p, min-p, penalties and biases.

The order is that of transformers: repetition penalty, the grammar's mask, temperature, top-k, top-p, min-p.
OpenAI's bias, presence and frequency penalties are added to the logits before the mask. The filters see only
what the grammar allows. Everything is float32.

A token is drawn by an exponential race: with u ~ Uniform(0, 1) per token, argmax p_i / -log(u_i) has
distribution p (the Gumbel-max trick, written without the outer logarithm). It costs more random numbers than
inverting the cumulative distribution, but a rounding error in a logit then changes the choice only when two
tokens nearly tie, while it moves every boundary of a cumulative sum. Each row draws from a generator of its
own, so a request's tokens do not depend on what else is in the batch.

Log-probabilities are those of log_softmax(logits / temperature), *before* the penalties, the bias and the
filters. A trainer recomputes the same numbers with the same temperature, as policy-gradient methods need.
Where filters are on, they are not the probabilities of the filtered distribution. At temperature 0, and below
1e-4, which is greedy as well, the temperature counts as 1.

This file uses log1p, softmax and log_softmax of whole rows, but not log, exp or logsumexp: torch computes
those with MKL on CPUs, whose threads ignore `runtime.one_thread`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatwright.config import UserError, near_match

COLDEST = 1e-4
"""Temperatures below it are greedy. At it, a token is drawn e^20 times less often than one whose logit is
0.002 higher, so that nothing is to be told from greedy; far below, float32 overflows."""
SMALLEST_TOP_P = 1e-6
"""A top_p below it keeps one token, the likeliest, which no vocabulary of up to a million tokens gives less.
So it is greedy."""
SEEDS = 2**64
"""Seeds count modulo this: -1 is the same stream as 2^64 - 1."""
NUCLEUS_WIDTH = 512
"""Top-p sorts this many of the likeliest tokens first, and the whole vocabulary only when their probability
does not suffice."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and when to stop. Raises UserError for values that make no sense."""

    max_new_tokens: int = 128
    """Most tokens to produce; fewer where the context ends earlier."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token (greedy), and so does all that is below 1e-4."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all (Fan et al. 2018, arXiv:1805.04833)."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities sum to this; 1 keeps all, 0 the likeliest alone (Holtzman et
    al. 2020, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 keeps all (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer
    (arXiv:1909.05858, 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer has so far (OpenAI's definition); -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that the answer has the token so far (OpenAI's definition); -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), -100 to 100; may be given as a dictionary."""
    top_logprobs: int = 0
    """Report this many of the likeliest tokens at each position, with their log-probabilities; 0 to 20."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """Seed of the request's own random stream, any whole number of 64 bits; None takes a fresh one."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(
                f"sampling: stop is {self.stop!r}; it must be a list of texts, none of them empty"
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        checks = (
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            ("temperature", _within(self.temperature, 0.0, math.inf), "a number, 0 (greedy) or more"),
            ("top_k", _whole(self.top_k, 0), "a whole number, at least 0 (0 keeps all tokens)"),
            ("top_p", _within(self.top_p, 0.0, 1.0), "between 0 (the likeliest token) and 1 (keeps all)"),
            ("min_p", _within(self.min_p, 0.0, 1.0), "between 0 (keeps all tokens) and 1"),
            (
                "repetition_penalty",
                _within(self.repetition_penalty, 0.0, math.inf) and self.repetition_penalty > 0,
                "a number above 0 (1 changes nothing)",
            ),
            (
                "presence_penalty",
                _within(self.presence_penalty, -2.0, 2.0),
                "a number from -2 to 2 (0 changes nothing)",
            ),
            (
                "frequency_penalty",
                _within(self.frequency_penalty, -2.0, 2.0),
                "a number from -2 to 2 (0 changes nothing)",
            ),
            ("top_logprobs", _whole(self.top_logprobs, 0, 21), "a whole number from 0 to 20"),
            (
                "seed",
                self.seed is None or _whole(self.seed, 1 - SEEDS, SEEDS),
                "a whole number between -2^64 and 2^64, or none",
            ),
        )
        for name, fine, wanted in checks:
            if not fine:
                raise UserError(f"sampling: {name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is drawn."""
        return self.temperature < COLDEST or self.top_p < SMALLEST_TOP_P

    @property
    def scale(self) -> float:
        """What logits are divided by for log-probabilities: the temperature; 1 where that counts as 0."""
        return 1.0 if self.temperature < COLDEST else self.temperature

    @property
    def looks_back(self) -> bool:
        """Whether penalties make a token's choice depend on earlier ones other than through the model."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)


def sampling_from(options: Mapping[str, Any]) -> Sampling:
    """The sampling of options by name: `{"temperature": 0.2}`. Raises UserError for a name that there is
    none of, with the nearest one, and for values that make no sense."""
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise UserError(f"sampling has no option {name!r}{near_match(name, known)}")
    return Sampling(**options)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if isinstance(pairs, Sequence) and not isinstance(pairs, str):
        pairs = tuple(tuple(pair) if isinstance(pair, Sequence) else pair for pair in pairs)
        if all(
            isinstance(pair, tuple)
            and len(pair) == 2
            and _whole(pair[0], 0)
            and _within(pair[1], -100.0, 100.0)
            for pair in pairs
        ):
            return pairs
    raise UserError(f"sampling: logit_bias is {bias!r}; it must give token ids numbers from -100 to 100")


def _whole(value: object, least: int, beyond: int | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= least and (beyond is None or value < beyond)


def _within(value: object, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and least <= value <= most


def make_generator(sampling: Sampling, device: torch.device | str = "cpu") -> torch.Generator | None:
    """The random stream of a request; None for a greedy one, which needs none.

    Streams are the same on every CPU; other kinds of devices have other streams.
    """
    if sampling.greedy:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()  # from the operating system; the global generator is left alone
    else:
        generator.manual_seed(sampling.seed % SEEDS)
    return generator


def nth_seed(seed: int, number: int) -> int:
    """The seed of answer `number` to a request with `seed`: the next ones, and 0 after the largest."""
    return seed + number if seed + number < SEEDS else seed + number - SEEDS


class BatchSampler:
    """The settings of a batch of rows as tensors, so that one pass over (B, V) logits serves them all.

    settings, generators and histories have an entry per row. A row's history, prompt and answer so far, is
    for its repetition penalty. The last `answered` ids of it are the answer, for the presence and frequency
    penalties. `__call__` adds the tokens that it draws to both.
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        generators: Sequence[torch.Generator | None],
        histories: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        answered: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self.generators = list(generators)
        greedy = [sampling.greedy for sampling in settings]
        self.all_greedy = all(greedy)
        self.greedy = torch.tensor(greedy, device=device) if any(greedy) else None
        temperatures = [sampling.scale for sampling in settings]
        self.temperature = column(temperatures) if any(value != 1.0 for value in temperatures) else None
        # A greedy row takes the likeliest token, which no filter ever drops: it goes unfiltered.
        filters = [Sampling() if cold else sampling for cold, sampling in zip(greedy, settings, strict=True)]
        top_k = [min(sampling.top_k, vocab_size) or vocab_size for sampling in filters]
        self.top_k_rows = _rows([k < vocab_size for k in top_k], device)
        self.top_k = torch.tensor([k for k in top_k if k < vocab_size], dtype=torch.int64, device=device)
        self.top_p_rows = _rows([sampling.top_p < 1.0 for sampling in filters], device)
        self.top_p = column([sampling.top_p for sampling in filters if sampling.top_p < 1.0])
        min_p = [sampling.min_p for sampling in filters]
        self.log_min_p = column(min_p).log() if any(min_p) else None
        penalties = [sampling.repetition_penalty for sampling in settings]
        self.penalty = self.seen = None
        if any(penalty != 1.0 for penalty in penalties):
            self.penalty = column(penalties)
            self.seen = torch.zeros(len(penalties), vocab_size, dtype=torch.bool, device=device)
            for row, (penalty, history) in enumerate(zip(penalties, histories, strict=True)):
                if penalty != 1.0:
                    self.seen[row, torch.tensor(history, dtype=torch.int64, device=device)] = True
        self.bias = self.counts = None
        if any(sampling.logit_bias for sampling in settings):
            self.bias = torch.zeros(len(settings), vocab_size, device=device)
            for row, sampling in enumerate(settings):
                for token, value in sampling.logit_bias:
                    self.bias[row, token] += value
        if any(sampling.presence_penalty or sampling.frequency_penalty for sampling in settings):
            self.presence = column([sampling.presence_penalty for sampling in settings])
            self.frequency = column([sampling.frequency_penalty for sampling in settings])
            self.counts = torch.zeros(len(settings), vocab_size, device=device)
            for row, (history, length) in enumerate(
                zip(histories, answered or [0] * len(settings), strict=True)
            ):
                answer = torch.tensor(history[len(history) - length :], dtype=torch.int64, device=device)
                self.counts[row] = torch.bincount(answer, minlength=vocab_size)
        self.tops = [sampling.top_logprobs for sampling in settings]

    def process(
        self, logits: Float[Tensor, "B V"], allowed: Bool[Tensor, "#B V"] | None = None
    ) -> Float[Tensor, "B V"]:
        """Logits of the distribution to draw from; tokens that must not be drawn are -inf. Greedy rows have
        only penalties, bias and grammar applied.

        allowed: True on tokens that may be drawn, as a row's grammar says, at least one of each row; None
            allows all.
        """
        x = logits.float()
        if self.seen is not None and self.penalty is not None:
            x = torch.where(self.seen, torch.where(x > 0, x / self.penalty, x * self.penalty), x)
        if self.bias is not None:
            x = x + self.bias
        if self.counts is not None:
            x = x - self.frequency * self.counts - self.presence * (self.counts > 0)
        if allowed is not None:
            x = x.masked_fill(~allowed, -math.inf)
        if self.temperature is not None:
            x = x / self.temperature
        if self.top_k_rows is not None:
            x = x.index_copy(0, self.top_k_rows, keep_top_k(x[self.top_k_rows], self.top_k))
        if self.top_p_rows is not None:
            x = x.index_copy(0, self.top_p_rows, keep_top_p(x[self.top_p_rows], self.top_p))
        if self.log_min_p is not None:
            x = x.masked_fill(x < x.amax(-1, keepdim=True) + self.log_min_p, -math.inf)
        return x

    def __call__(
        self, logits: Float[Tensor, "B V"], allowed: Bool[Tensor, "#B V"] | None = None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
        """A token per row, and its log-probability (see the top of this file), which is not finite where the
        row's logits are not.

        allowed: as in `process`.
        """
        logits = logits.float()
        processed = self.process(logits, allowed)
        if self.all_greedy:
            ids = processed.argmax(-1)
        else:
            race = processed.softmax(-1) / self._race(logits)
            if allowed is not None:  # a single allowed token must win even with race 0
                race = race.masked_fill(~allowed, -1.0)
            ids = race.argmax(-1)
            if self.greedy is not None:
                ids = torch.where(self.greedy, processed.argmax(-1), ids)
        scaled = logits if self.temperature is None else logits / self.temperature
        logprobs = scaled.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.counts is not None:
            self.counts[torch.arange(len(ids), device=ids.device), ids] += 1.0
        return ids, logprobs

    def alternatives(
        self, logits: Float[Tensor, "B V"], known: Bool[Tensor, " V"] | None = None
    ) -> list[list[list[tuple[int, float]]]]:
        """Per row a list whose only entry is its `top_logprobs` likeliest tokens, or an empty list for 0.

        known: True on ids that have a token; others are not listed.
        """
        if not any(self.tops):
            return [[] for _ in self.tops]
        scaled = logits.float() if self.temperature is None else logits.float() / self.temperature
        logprobs = scaled.log_softmax(-1)
        if known is not None:
            logprobs = logprobs.masked_fill(~known, -math.inf)
        values, ids = logprobs.topk(min(max(self.tops), logits.shape[1]), dim=-1)
        return [
            [list(zip(row_ids[:most], row_values[:most], strict=True))] if most else []
            for most, row_ids, row_values in zip(self.tops, ids.tolist(), values.tolist(), strict=True)
        ]

    def _race(self, like: Tensor) -> Tensor:
        """(B, V) standard exponential numbers, each row from its own generator.

        `uniform_` is used because `exponential_` is five times as slow on CPUs. u = 0 gives infinity, which
        never wins.
        """
        uniform = torch.full_like(like, 0.5)
        for row, generator in zip(uniform, self.generators, strict=True):
            if generator is not None:
                row.uniform_(generator=generator)
        return uniform.sub_(1.0).log1p_().neg_()  # the difference is exact


def _rows(wanted: list[bool], device: torch.device | str) -> Tensor | None:
    """Indices of the True rows; None when there are none."""
    return torch.tensor(wanted, device=device).nonzero()[:, 0] if any(wanted) else None


def keep_top_k(logits: Float[Tensor, "B V"], k: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """-inf for all but each row's k likeliest tokens (all that tie with the last one stay). 1 <= k <= V."""
    values = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < values.gather(1, k[:, None] - 1), -math.inf)


def keep_top_p(logits: Float[Tensor, "B V"], top_p: Float[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """-inf for all but the likeliest tokens that reach a sum of top_p; the token that crosses it stays."""
    probabilities = logits.softmax(-1)
    vocabulary = logits.shape[-1]
    width = min(NUCLEUS_WIDTH, vocabulary)
    while True:
        probability, index = probabilities.topk(width, dim=-1)
        mass = probability.cumsum(-1)
        if width == vocabulary or bool((mass[:, -1:] >= top_p).all()):
            break
        width = vocabulary
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, mass - probability < top_p)
    return logits.masked_fill(~keep, -math.inf)


def process_logits(
    logits: Float[Tensor, " V"], previous: Sequence[int], sampling: Sampling
) -> Float[Tensor, " V"]:
    """Logits of the distribution that `sampling` draws from after the ids `previous`; -inf for what it
    drops."""
    sampler = BatchSampler([sampling], [None], [previous], vocab_size=logits.shape[-1], device=logits.device)
    return sampler.process(logits[None])[0]


def sample(
    logits: Float[Tensor, " V"],
    sampling: Sampling,
    generator: torch.Generator | None = None,
    previous: Sequence[int] = (),
) -> int:
    """One token. `generator` is the request's stream (`make_generator`); None makes one from the sampling's
    seed."""
    generator = generator or make_generator(sampling, logits.device)
    sampler = BatchSampler(
        [sampling], [generator], [previous], vocab_size=logits.shape[-1], device=logits.device
    )
    return int(sampler(logits[None])[0])
