"""Comparisons -> batches for a reward model: their sources, their annotators, and how a row is encoded."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatwright import runtime
from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.examples import Comparison, Dialogue, LabelledText
from chatwright.data.loader import WIDTH_STEP, SampleOrder, pad
from chatwright.data.records import read_records
from chatwright.messages import described, written
from chatwright.objectives.preference import Ties, pair_wins, preferred_pairs
from chatwright.tokenizer import Tokenizer

SIDES = ("train", "validation")
PASSES = 8
"""Comparisons that each rated text takes part in, each time with other texts and another prompt."""


class RankingConfig(Protocol):
    """The settings that batches of comparisons depend on."""

    @property
    def tie_tolerance(self) -> float: ...
    @property
    def ties(self) -> Ties: ...
    @property
    def rating_margin(self) -> float: ...
    @property
    def max_tokens(self) -> int: ...


@dataclass(frozen=True)
class RankedBatch:
    """N prompts with K answers each, one row per answer, padded on the right."""

    ids: Int[Tensor, "rows time"]
    mask: Bool[Tensor, "rows time"]
    labels: Float[Tensor, "prompts k"]
    tie_tolerance: float
    rating_margin: float = 0.0
    ties: Ties = "leave_out"

    @property
    def weight(self) -> float:
        """Number of prompts with at least one pair that counts."""
        return float((pair_wins(self.labels, self.tie_tolerance, self.ties) > 0).flatten(1).any(1).sum())


class AnswerEncoder:
    """Prompts with answers as ids. Each prompt and each answer is tokenised once, and kept."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self._prompts: dict[str, array[int]] = {}
        self._answers: dict[str, array[int]] = {}

    def read(self, answers: Iterable[str]) -> None:
        """Tokenise many answers at once, on all cores."""
        new = list(dict.fromkeys(one for one in answers if one not in self._answers))
        for start in range(0, len(new), TOGETHER):
            part = new[start : start + TOGETHER]
            for text, ids in zip(part, self.tokenizer.encode_batch(part), strict=True):
                self._answers[text] = array("i", ids)

    def prompt(self, prompt: Sequence[Message]) -> array[int]:
        """The ids of a prompt, up to where the answer begins."""
        key = json.dumps(prompt)
        if key not in self._prompts:
            encoded = self.template.encode(list(prompt), self.tokenizer, add_generation_prompt=True)
            self._prompts[key] = array("i", encoded.ids)
        return self._prompts[key]

    def answer(self, answer: str) -> array[int]:
        """The ids of an answer, without its end token."""
        if answer not in self._answers:
            self._answers[answer] = array("i", self.tokenizer.encode(answer))
        return self._answers[answer]

    def row(self, prompt: Sequence[Message], answer: str, max_tokens: int = 0) -> list[int]:
        """Prompt, answer and end token as at most `max_tokens` ids (0: any number).

        An answer stays whole where it fits, and the prompt loses its beginning; what is still too long loses
        the answer's end. A row always ends with the end token, where it is scored."""
        before, content = self.prompt(prompt), self.answer(answer)
        limit = max_tokens or len(before) + len(content) + 2
        content = content[: limit - 2]
        room = limit - 1 - len(content)
        end = self.template.end_id(self.tokenizer)
        return [*before[len(before) - min(room, len(before)) :], *content, end]


TOGETHER = 4096
"""Answers that are tokenised in one call."""


def encode_answer(
    prompt: Sequence[Message], answer: str, template: ChatTemplate, tokenizer: Tokenizer, max_tokens: int
) -> list[int]:
    """One row of `AnswerEncoder`."""
    return AnswerEncoder(template, tokenizer).row(prompt, answer, max_tokens)


def padded(
    rows: list[list[int]], tokenizer: Tokenizer
) -> tuple[Int[Tensor, "rows time"], Bool[Tensor, "rows time"]]:
    """Rows as one tensor, padded on the right, and a mask that is True on real tokens."""
    ids = pad(rows, tokenizer.end_of_text_id, multiple=WIDTH_STEP)
    return ids, pad([[1] * len(row) for row in rows], 0, multiple=WIDTH_STEP).bool()


def first_prompts(file: Path, most: int = 2_000) -> list[tuple[Message, ...]]:
    """The first user turns of up to `most` conversations of a file. Only short ones (under 24 characters),
    where there are any, for a prompt costs time in every row; else all. Raises UserError."""
    records = islice(read_records(file, Dialogue), most)
    first = [dialogue.messages[:1] for dialogue in records if dialogue.messages[0]["role"] == "user"]
    return [turn for turn in first if len(described(turn[0]["content"])) < 24] or first


def demonstrations(file: Path, most: int) -> list[Comparison]:
    """Up to `most` answers written by people, each the first of a conversation that is to be learnt. They are
    compared with nothing: the second answer is empty, and is there because a comparison needs two."""
    found = []
    for dialogue in read_records(file, Dialogue):
        roles = [message["role"] for message in dialogue.messages]
        place = next(iter(dialogue.answers), 0)
        if "user" in roles[:place]:
            found.append(
                Comparison.of(
                    dialogue.messages[:place], (written(dialogue.messages[place]["content"]), ""), (0.0, 0.0)
                )
            )
        if len(found) == most:
            break
    return found


def from_ratings(
    texts: Sequence[LabelledText], prompts: Sequence[tuple[Message, ...]], k: int, seed: int, passes: int = 1
) -> list[Comparison]:
    """Each text once per pass, K at a time, as the answers to a prompt drawn at random; ratings are the
    scores.

    Prompt and text are unrelated: the model is to score the text whatever came before. The K texts of a
    comparison have about the same length, within the jitter of 20 % that makes each pass different. So length
    cannot decide a comparison, and there is little padding.
    """
    if not prompts:
        raise UserError("there are no conversations to take prompts from; set `dialogues` in the data stage")
    result = []
    lengths = torch.tensor([float(len(text.text)) for text in texts])
    for turn in range(passes):
        draw = runtime.generator("ratings", seed, turn)
        order = (lengths * (1 + 0.2 * torch.rand(len(texts), generator=draw))).argsort().tolist()
        for start in range(0, len(order) - k + 1, k):
            group = [texts[n] for n in order[start : start + k]]
            prompt = prompts[int(torch.randint(len(prompts), (1,), generator=draw))]
            result.append(
                Comparison.of(prompt, [text.text for text in group], [text.label for text in group])
            )
    if not result:
        raise UserError(
            f"{len(texts)} rated texts are too few for comparisons of {k}; lower k or add ratings"
        )
    return result


@dataclass(frozen=True)
class Rankings:
    """Comparisons in a random order; a sample depends on the seed and its index alone."""

    comparisons: list[Comparison]
    template: ChatTemplate
    tokenizer: Tokenizer
    config: RankingConfig
    order: SampleOrder
    encoder: AnswerEncoder | None = None
    """Where the answers are already tokenised."""

    @cached_property
    def _encoder(self) -> AnswerEncoder:
        return self.encoder or AnswerEncoder(self.template, self.tokenizer)

    def take(self, start: int, count: int) -> RankedBatch:
        """Samples start ... start + count - 1."""
        return self.batch([self.comparisons[n] for n in self.order.take(start, count)])

    def batch(self, chosen: Sequence[Comparison], k: int = 0) -> RankedBatch:
        """These comparisons as tensors. Prompts with fewer answers than others, or than `k`, are padded with
        unrated empty ones."""
        k = max(k, *(len(one.responses) for one in chosen))
        config, rows, labels = self.config, [], []
        for one in chosen:
            for n in range(k):
                answer = one.responses[n] if n < len(one.responses) else ""
                rows.append(self._encoder.row(one.prompt, answer, config.max_tokens))
                labels.append(one.scores[n] if n < len(one.scores) else float("nan"))
        ids, mask = padded(rows, self.tokenizer)
        return RankedBatch(
            ids,
            mask,
            torch.tensor(labels).view(-1, k),
            config.tie_tolerance,
            config.rating_margin,
            config.ties,
        )


# ---- sources and annotators --------------------------------------------------------------------------------


def own_comparisons(directory: Path) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons of a data stage or of the user's directory. Raises UserError."""
    both = [list(read_records(directory / f"comparisons-{side}.jsonl", Comparison)) for side in SIDES]
    for side, found in zip(SIDES, both, strict=True):
        if not found:
            raise UserError(
                f"{directory / f'comparisons-{side}.jsonl'} is empty; nothing to learn or to measure"
            )
    return both[0], both[1]


FROM_RATINGS = 16
"""Answers of a comparison made from ratings, where the setting does not say."""


def rated_comparisons(
    records: Path, k: int, seed: int, *, labels: int = 0
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons of `k` answers made from rated texts (0: `FROM_RATINGS`, or as many
    as there are), for training from `labels` of them (0: all). Raises UserError."""
    sides = {}
    for side in SIDES:
        texts = list(read_records(records / f"ratings-{side}.jsonl", LabelledText))
        sides[side] = drawn(texts, labels, seed) if side == "train" else texts
    k = k or max(2, min(FROM_RATINGS, *map(len, sides.values())))
    made = [
        from_ratings(sides[side], first_prompts(records / f"dialogues-{side}.jsonl"), k, seed, passes)
        for side, passes in zip(SIDES, (PASSES, 1), strict=True)
    ]
    return made[0], made[1]


def drawn(texts: list[LabelledText], labels: int, seed: int) -> list[LabelledText]:
    """`labels` of the texts, chosen by the seed, in their order; all of them for 0. Raises UserError when
    there are fewer."""
    if not labels:
        return texts
    if labels > len(texts):
        raise UserError(f"labels is {labels}, but there are {len(texts)} rated texts to learn from")
    return [
        texts[n] for n in sorted(SampleOrder(len(texts), runtime.seed_for(seed, "labels")).take(0, labels))
    ]


def refuse_ties(train: Sequence[Comparison], config: RankingConfig) -> None:
    """Raise UserError when no training comparison says that one answer is better than another."""
    if any(preferred_pairs(torch.tensor([one.scores]), config.tie_tolerance).any() for one in train):
        return
    within = f" within tie_tolerance {config.tie_tolerance:g}" if config.tie_tolerance else ""
    raise UserError(
        f"all {len(train):,} training comparisons are ties{within}: no answer is preferred to another, and "
        "there is nothing to learn; look at their scores"
    )


@dataclass(frozen=True)
class Split:
    """Comparisons for training, and held-out ones by annotators who are, or are not, in training."""

    train: list[Comparison]
    held_out: list[Comparison]
    """Held-out prompts, by annotators whose other comparisons are trained on."""
    held_out_annotators: list[Comparison]
    """Held-out prompts, by annotators none of whose comparisons is trained on."""


def without_annotators(train: list[Comparison], held_out: list[Comparison], names: str) -> Split:
    """Keep the comparisons of some annotators (names, comma-separated) out of training.

    Both kinds of annotators are measured on held-out prompts, so that only the annotator differs. Comparisons
    of held-out annotators on training prompts are not used. Raises UserError for an unknown name, or when one
    of the parts would be empty.
    """
    chosen = {name.strip() for name in names.split(",") if name.strip()}
    if not chosen:
        return Split(train, held_out, [])
    known = {one.annotator for one in [*train, *held_out]} - {""}
    if not known:
        raise UserError("held_out_annotators: no comparison says who made it (column `annotator`)")
    if unknown := sorted(chosen - known):
        told = ", ".join(sorted(known)[:10])
        raise UserError(
            f"held_out_annotators: nobody is called {', '.join(unknown)}; annotators: "
            f"{told}{' ...' if len(known) > 10 else ''}"
        )
    held_out_annotators = [one for one in held_out if one.annotator in chosen]
    kept, measured = ([one for one in side if one.annotator not in chosen] for side in (train, held_out))
    for what, found in (
        ("training comparisons by others", kept),
        ("held-out comparisons by others", measured),
        ("comparisons of theirs on held-out prompts", held_out_annotators),
    ):
        if not found:
            raise UserError(
                f"held_out_annotators {names}: there are no {what}; hold out others, or raise the validation "
                "share"
            )
    return Split(kept, measured, held_out_annotators)
