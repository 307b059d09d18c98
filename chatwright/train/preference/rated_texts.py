"""Rated texts -> batches for the classifier: what is learnt from, and what its scores are scaled by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.examples import LabelledText
from chatwright.data.loader import SampleOrder
from chatwright.data.records import read_records
from chatwright.data.splitting import split_of
from chatwright.tokenizer import Tokenizer
from chatwright.train.preference.rankings import encode_answer, padded


class TextConfig(Protocol):
    """The settings that decide which texts are good, and how long a row is."""

    @property
    def threshold(self) -> float: ...
    @property
    def neutral(self) -> float: ...
    @property
    def calibration(self) -> float: ...
    @property
    def max_tokens(self) -> int: ...


@dataclass(frozen=True)
class TextBatch:
    """One row per text, padded on the right."""

    ids: Int[Tensor, "rows time"]
    mask: Bool[Tensor, "rows time"]
    positive: Bool[Tensor, " rows"]

    @property
    def weight(self) -> float:
        """Number of texts."""
        return float(len(self.positive))


@dataclass(frozen=True)
class Texts:
    """Rated texts behind prompts, in an order that depends on the seed and the index alone."""

    texts: Sequence[LabelledText]
    prompts: Sequence[tuple[Message, ...]]
    template: ChatTemplate
    tokenizer: Tokenizer
    config: TextConfig
    order: SampleOrder

    def take(self, start: int, count: int) -> TextBatch:
        """Samples start ... start + count - 1."""
        numbers = self.order.take(start, count)
        asked = [
            self.prompts[(number + start + place) % len(self.prompts)] for place, number in enumerate(numbers)
        ]
        return self.batch([self.texts[number] for number in numbers], asked)

    def batch(self, texts: Sequence[LabelledText], prompts: Sequence[Sequence[Message]]) -> TextBatch:
        """These texts behind these prompts as tensors."""
        rows = [
            encode_answer(prompt, one.text, self.template, self.tokenizer, self.config.max_tokens)
            for one, prompt in zip(texts, prompts, strict=True)
        ]
        ids, mask = padded(rows, self.tokenizer)
        return TextBatch(ids, mask, torch.tensor([one.label > self.config.threshold for one in texts]))


@dataclass(frozen=True)
class Parts:
    """Rated texts that are good or bad: what is learnt from, what the scale is fitted to, what is
    measured."""

    train: list[LabelledText]
    calibration: list[LabelledText]
    held_out: list[LabelledText]
    all_held_out: list[LabelledText]
    """The neutral ones among them."""

    def __str__(self) -> str:
        """How many of each."""
        train, apart, held_out = len(self.train), len(self.calibration), len(self.held_out)
        return f"{train:,} texts, {apart:,} to calibrate with, {held_out:,} held out"


def load_texts(config: TextConfig, records: Path) -> Parts:
    """The texts of a data stage. Raises UserError when one side lacks good or bad ones."""

    def clear(texts: list[LabelledText]) -> list[LabelledText]:
        return [
            one for one in texts if abs(one.label - config.threshold) > config.neutral or config.neutral == 0
        ]

    learnt = clear(list(read_records(records / "ratings-train.jsonl", LabelledText)))
    everything = list(read_records(records / "ratings-validation.jsonl", LabelledText))
    sides = [split_of(f"calibration:{one.id}", config.calibration) for one in learnt]
    train, apart = (
        [one for one, side in zip(learnt, sides, strict=True) if side == wanted]
        for wanted in ("train", "validation")
    )
    parts = Parts(train, apart, clear(everything), everything)
    for name in ("train", "calibration", "held_out"):
        good = sum(one.label > config.threshold for one in getattr(parts, name))
        if not 0 < good < len(getattr(parts, name)):
            raise UserError(
                f"classifier: of {len(getattr(parts, name))} texts for {name} {good} are good: both kinds "
                f"are needed; set `threshold` (now {config.threshold:g}) to a rating between good and bad, "
                "`neutral` lower, or add ratings"
            )
    return parts


def are_good(texts: Sequence[LabelledText], config: TextConfig) -> Bool[Tensor, " n"]:
    """Which of the texts people called good."""
    return torch.tensor([one.label > config.threshold for one in texts])
