"""Rollouts: prompts -> sampled completions, with everything that PPO needs for each token.

Columns of all (B, T) tensors are positions of prompt + completion, padded on the right. `log_probs[b, t]`
belongs to token t. `values[b, t]` is the critic's estimate BEFORE token t, its output at position t - 1
(docs/papers.md, point 7: values are shifted by one against the log-probabilities).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chatwright import runtime
from chatwright.data.loader import WIDTH_STEP, pad
from chatwright.generate.engine import Engine
from chatwright.generate.request import Request
from chatwright.generate.sampling import Sampling
from chatwright.language_model import exact_runner
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.ragged import bucket_size
from chatwright.objectives import policy as objective
from chatwright.objectives.language import projected_log_probs
from chatwright.tokenizer import Tokenizer
from chatwright.train.parallel.context import ParallelContext

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Entropy = Literal["", "known", "learnt"]
"""How the entropy of the policy is computed: not at all (""), without gradient (`known`), or with it
(`learnt`). It takes time with a large vocabulary."""


@dataclass(frozen=True)
class Completions:
    """Sampled completions. `real` is True on tokens that are not padding, `response` on completion tokens,
    the end token included. `ids` and both masks include the prompt's columns."""

    ids: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    response: Bool[Tensor, "batch time"]
    finished: Bool[Tensor, " batch"]
    """Whether the completion has its end token."""
    sampled: Float[Tensor, "batch time"]
    """The sampler's own log-probabilities of the completion tokens, 0 elsewhere."""

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row, prompt and completion."""
        return self.real.sum(1)

    @property
    def before(self) -> Int[Tensor, " tokens"]:
        """Flat index (row x time + column) before each completion token: a model's output there predicts this
        token."""
        return self.response.flatten().nonzero()[:, 0] - 1

    def placed(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "batch time"]:
        """Scatter one number per completion token, in row order, to the tokens' positions; 0 elsewhere."""
        return torch.zeros(self.ids.shape, device=values.device).masked_scatter(self.response, values)

    def rows(self, chosen: Tensor) -> Completions:
        """Some of the rows."""
        return chosen_rows(self, chosen)


class Rollout(Protocol):
    """An iteration's completions with everything computed before its updates; constants for the updates."""

    @property
    def answers(self) -> Completions:
        """The completions."""

    @property
    def weight(self) -> float:
        """Number of terms in the loss's sum."""

    def rows(self, chosen: Tensor) -> Any:
        """Some of the rows."""


Batch = TypeVar("Batch", bound="DataclassInstance")


def mapped(function: Callable[..., Tensor], *batches: Batch) -> Batch:
    """Apply `function` to each field's tensors of dataclasses of the same class (nested ones too); returns
    such a dataclass."""
    values = []
    for field in fields(batches[0]):
        parts: list[Any] = [getattr(batch, field.name) for batch in batches]
        values.append(function(*parts) if isinstance(parts[0], Tensor) else mapped(function, *parts))
    return type(batches[0])(*values)


def chosen_rows(batch: Batch, chosen: Tensor) -> Batch:
    """Some of the rows of a dataclass of tensors."""
    return mapped(lambda one: one[chosen], batch)


def concat(batches: Sequence[Batch]) -> Batch:
    """Concatenate the rows of dataclasses of tensors; narrower tensors are padded on the right with 0 or
    False."""

    def stacked(*tensors: Tensor) -> Tensor:
        width = max(one.shape[-1] for one in tensors)
        return torch.cat([F.pad(one, (0, width - one.shape[1])) if one.ndim > 1 else one for one in tensors])

    return mapped(stacked, *batches)


def all_gather_completions(batch: Batch, parallel: ParallelContext) -> Batch:
    """All-gather the rows of all processes, in sample order; with one process, the batch itself."""
    if not parallel.together:
        return batch
    return runtime.on_device(concat(parallel.all_gather(mapped(lambda one: one.cpu(), batch))))


def as_tensors(batch: Any, prefix: str = "") -> dict[str, Tensor]:
    """A dataclass of tensors as named tensors for a checkpoint; booleans become bytes, which every format
    knows."""
    tensors: dict[str, Tensor] = {}
    for field in fields(batch):
        one = getattr(batch, field.name)
        if isinstance(one, Tensor):
            tensors[prefix + field.name] = one.byte() if one.dtype == torch.bool else one
        else:
            tensors |= as_tensors(one, f"{prefix}{field.name}.")
    return tensors


def from_tensors(kind: type[Batch], tensors: Mapping[str, Tensor], prefix: str = "") -> Batch:
    """Inverse of `as_tensors`. A field of a rollout that is no tensor must be its `Completions`."""
    values: list[Any] = []
    for field in fields(kind):
        one = tensors.get(prefix + field.name)
        if one is None:
            values.append(from_tensors(Completions, tensors, f"{prefix}{field.name}."))
        else:
            values.append(one.bool() if one.dtype == torch.uint8 else one)
    return kind(*values)


def sample_completions(
    policy: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_new_tokens: int,
    temperature: float,
    seed_parts: Sequence[object],
    first: int = 0,
    max_batch: int = 64,
    dtype: torch.dtype = torch.float32,
    filters: Mapping[str, Any] | None = None,
) -> Completions:
    """Sample one completion per prompt. `filters` are further settings of the sampler, such as top-p.

    Each has its own random stream, seeded by `seed_parts` and its number. Numbers count from `first`: the
    number of the first prompt, when a process samples only a part of them. On a CPU the compiled kernels
    sample, from copies of the current weights in `dtype`.
    """
    requests = [
        Request(
            prompt=tuple(prompt),
            sampling=Sampling(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=runtime.seed_for(*seed_parts, number),
                **(filters or {}),
            ),
            end_ids=frozenset({end}),
        )
        for number, prompt in enumerate(prompts, first)
    ]
    done = Engine(policy, None, max_batch=max_batch, runner=exact_runner(policy, dtype)).generate(requests)
    rows = [[*prompt, *one.ids] for prompt, one in zip(prompts, done, strict=True)]
    starts = torch.tensor([len(prompt) for prompt in prompts])
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad(rows, 0, multiple=WIDTH_STEP)
    place = torch.arange(ids.shape[1])
    real = place < lengths[:, None]
    response = real & (place >= starts[:, None])
    sampled = torch.zeros(ids.shape)
    sampled[response] = torch.tensor([value for one in done for value in one.logprobs])
    finished = torch.tensor([bool(one.ids) and one.ids[-1] == end for one in done])
    return runtime.on_device(Completions(ids, real, response, finished, sampled))


def completion_log_probs(
    model: GPT,
    answers: Completions,
    *,
    temperature: float,
    entropy: Entropy = "",
    hidden: Float[Tensor, "tokens width"] | None = None,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Log-probability and, if asked for, entropy (`learnt`: with its gradient) of every completion token
    under `model`; 0 elsewhere.

    Logits are divided by the sampling temperature, as they were when the tokens were drawn. They are float32
    products even under autocast (`projected_log_probs` says why). `hidden` are the model's hidden states
    before these tokens (`Completions.before`), where they are already computed.
    """
    if hidden is None:
        hidden = model.hidden_at(answers.ids, answers.before, lengths=answers.lengths)
    tokens = answers.ids[answers.response]
    if torch.is_grad_enabled() and not entropy:
        learnt = projected_log_probs(
            hidden, model.head.weight, tokens, temperature=temperature, softcap=model.config.logit_softcap
        )
        return answers.placed(learnt), torch.zeros(answers.ids.shape, device=learnt.device)
    more = bucket_size(len(tokens)) - len(tokens)  # as in projected_log_probs
    with runtime.full_precision():
        logits = model.head(F.pad(hidden.float(), (0, 0, 0, more)))[: len(tokens)]  # (answer tokens, V)
    log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    log_probs = answers.placed(log_p.gather(1, tokens[:, None])[:, 0])
    if not entropy:
        return log_probs, torch.zeros_like(log_probs)
    return log_probs, answers.placed(objective.entropy_of(log_p if entropy == "learnt" else log_p.detach()))


def values_before(critic: ScalarModel, answers: Completions) -> Float[Tensor, "batch time"]:
    """The critic's value before each completion token, 0 elsewhere."""
    return answers.placed(critic.at(answers.ids, answers.before, lengths=answers.lengths))


def degenerate(answers: Completions, *, min_tokens: int, max_repeats: float) -> Bool[Tensor, " batch"]:
    """Which completions have fewer than `min_tokens` tokens (end token not counted) or repeat too often.

    `max_repeats` is the largest allowed share of a completion's bigrams that occurred in it before.
    """
    flags = []
    for ids, mask in zip(answers.ids, answers.response, strict=True):
        tokens = ids[mask].tolist()
        bigrams = list(pairwise(tokens))
        repeats = 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0
        flags.append(len(tokens) - 1 < min_tokens or repeats > max_repeats)
    return torch.tensor(flags, device=answers.ids.device)


def texts_of(answers: Completions, tokenizer: Tokenizer) -> list[str]:
    """The completions as text. Ids beyond the tokenizer's vocabulary are left out: the model's vocabulary may
    be larger, and sampling draws from all of it."""
    spelt = answers.response & (answers.ids < tokenizer.vocab_size)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(answers.ids, spelt, strict=True)]


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of the texts together (Li et al. 2016,
    arXiv:1510.03055)."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
