"""ptx: a pre-training loss beside PPO's, so that the policy does not forget.  Ouyang et al. 2022, eq. 2.

The objective gains gamma E[log pi(x)] over texts x of pre-training. The report's alignment tax is the
perplexity of held-out general text before and after: it shows the cost of alignment with and without ptx.

Departures from the paper: the mean is over tokens (the paper does not say over what), so that `gamma` has
another scale than the paper's 27.8 for sums over texts. Texts are windows of the token stream, as in our
pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from chatwright import runtime
from chatwright.data.loader import SampleOrder
from chatwright.data.shards import TokenShards
from chatwright.model.gpt import GPT
from chatwright.objectives.language import chunked_next_token_loss
from chatwright.tokenizer import Tokenizer
from chatwright.train.held_out import held_out_bits_per_byte
from chatwright.train.trainer import Step


@dataclass(frozen=True)
class TextBatch:
    """Windows of general text that belong to a minibatch of completions."""

    ids: Int[Tensor, "windows context+1"]
    share: float
    """Factor of these windows' mean loss in the sum over the minibatch's completion tokens."""

    @property
    def weight(self) -> float:
        """0: the minibatch's sum is divided by its completion tokens alone."""
        return 0.0


@dataclass(frozen=True)
class GeneralText:
    """Training windows of general text in random order, and held-out text."""

    train: TokenShards
    held_out: TokenShards
    context: int
    order: SampleOrder

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer, context: int, seed: int) -> GeneralText:
        """The shards of a tokenizer stage. Raises UserError when they are missing or of another tokenizer."""
        train = TokenShards.open(directory / "train", tokenizer)
        held_out = TokenShards.open(directory / "validation", tokenizer)
        return cls(
            train, held_out, context, SampleOrder(train.windows(context), runtime.seed_for(seed, "ptx"))
        )

    def take(self, start: int, count: int) -> Int[Tensor, "count context+1"]:
        """Windows start ... start + count - 1 of the order."""
        return torch.stack(
            [self.train.window(number, self.context) for number in self.order.take(start, count)]
        )

    def perplexity(self, model: GPT) -> float:
        """exp of the mean negative log-likelihood of a held-out token."""
        with runtime.evaluating(model):
            bits = held_out_bits_per_byte(model, self.held_out, context=self.context, dtype=torch.float32)
        return float(2 ** (bits * self.held_out.text_bytes / self.held_out.tokens))


def text_step(policy: GPT, batch: TextBatch) -> Step:
    """gamma times the mean loss of the windows' tokens, scaled to the minibatch's sum."""
    hidden = policy.hidden(batch.ids[:, :-1])
    targets = batch.ids[:, 1:]
    total = chunked_next_token_loss(
        hidden,
        policy.head.weight,
        targets,
        torch.ones_like(targets, dtype=torch.bool),
        softcap=policy.config.logit_softcap,
    )
    return Step(total * (batch.share / targets.numel()))
