"""Rated texts -> batches for the classifier: what is learnt from, and what its scores are scaled by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.cuts import Room
from chatwright.data.examples import LabelledText
from chatwright.data.loader import SampleOrder
from chatwright.data.records import read_records
from chatwright.data.splitting import split_of
from chatwright.tokenizer import Tokenizer
from chatwright.train.preference.limits import CUT_END, CUT_PROMPT, RowLimits, limit_rows
from chatwright.train.preference.rankings import AnswerEncoder, padded


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
    encoder: AnswerEncoder | None = None
    """Where the texts are already tokenised."""

    @cached_property
    def _encoder(self) -> AnswerEncoder:
        return self.encoder or AnswerEncoder(self.template, self.tokenizer)

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
            self._encoder.row(prompt, one.text, self.config.max_tokens)
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
        return [one for one in texts if is_clear(one, config)]

    learnt = clear(list(read_records(records / "ratings-train.jsonl", LabelledText)))
    everything = list(read_records(records / "ratings-validation.jsonl", LabelledText))
    sides = [split_of(f"calibration:{one.id}", config.calibration) for one in learnt]
    train, apart = (
        [one for one, side in zip(learnt, sides, strict=True) if side == wanted]
        for wanted in ("train", "validation")
    )
    parts = Parts(train, apart, clear(everything), everything)
    check_parts(parts, config)
    return parts


def is_clear(one: LabelledText, config: TextConfig) -> bool:
    """Whether a text is good or bad, and not neutral."""
    return config.neutral == 0 or abs(one.label - config.threshold) > config.neutral


def check_parts(parts: Parts, config: TextConfig, why: str = "") -> None:
    """Raise UserError when one side lacks good or bad texts; `why` says what was left out before."""
    for name in ("train", "calibration", "held_out"):
        good = sum(one.label > config.threshold for one in getattr(parts, name))
        if not 0 < good < len(getattr(parts, name)):
            advice = why or (
                f"set `threshold` (now {config.threshold:g}) to a rating between good and bad, `neutral` "
                "lower, or add ratings"
            )
            raise UserError(
                f"classifier: of {len(getattr(parts, name))} texts for {name} {good} are good: both kinds "
                f"are needed; {advice}"
            )


def parts_within(
    parts: Parts,
    prompts: Sequence[Sequence[Message]],
    encoder: AnswerEncoder,
    config: TextConfig,
    room: Callable[[int], Room],
) -> tuple[Parts, RowLimits]:
    """The texts that can be told apart within the limit of a row, and the limit. Texts that are the same when
    they are cut, though some are good and some bad, are left out. Raises UserError as `check_parts` does."""
    sides = (parts.train, parts.calibration, parts.all_held_out)
    encoder.read(one.text for side in sides for one in side)
    before = max(len(encoder.prompt(prompt)) for prompt in prompts)
    lengths = [before + len(encoder.answer(one.text)) + 1 for side in sides for one in side]
    limits = limit_rows(config.max_tokens, lengths, room, "texts behind the longest prompt")
    beginnings: dict[tuple[int, ...], list[LabelledText]] = {}
    for one in (one for side in sides for one in side):
        size = len(encoder.answer(one.text))
        limits.cuts.saw(before + size + 1)
        if size > limits.limit - 2:
            limits.cuts.add(CUT_END)
        elif before + size + 1 > limits.limit:
            limits.cuts.add(CUT_PROMPT)
        if size >= limits.limit - 2 and is_clear(one, config):
            beginnings.setdefault(tuple(encoder.answer(one.text)[: limits.limit - 2]), []).append(one)
    alike = {
        one.text
        for group in beginnings.values()
        if len({one.label > config.threshold for one in group}) > 1 and len({one.text for one in group}) > 1
        for one in group
    }
    if alike:
        limits.cuts.add("that are the same as one of the other class, left out", len(alike))
        kept = (
            [one for one in side if one.text not in alike]
            for side in (parts.train, parts.calibration, parts.held_out, parts.all_held_out)
        )
        parts = replace(parts, **dict(zip(PARTS, kept, strict=True)))
        check_parts(parts, config, str(limits.cuts))
    return parts, limits


PARTS = ("train", "calibration", "held_out", "all_held_out")


def are_good(texts: Sequence[LabelledText], config: TextConfig) -> Bool[Tensor, " n"]:
    """Which of the texts people called good."""
    return torch.tensor([one.label > config.threshold for one in texts])
