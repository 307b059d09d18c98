"""Prompts to sample answers to, from conversations; and how long prompts and answers may be.

Limits of 0 come from the same conversations: people's own answers say how long an answer may have to be. An
answer that is cut off has no end token, and is penalised, however good it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.data.cuts import Cuts, Room, length_of_data, rounded_up
from chatwright.data.examples import Dialogue
from chatwright.messages import described, written
from chatwright.metrics import say
from chatwright.tokenizer import Tokenizer
from chatwright.train.base import ChatBase
from chatwright.train.planning.limits import room_for
from chatwright.train.planning.program import StagePlan
from chatwright.train.workspace import Report

Settings = TypeVar("Settings")

STEP = 8
"""Limits that come from the data are multiples of this."""
WHOLE = 0.99
"""Share of the prompts, and of people's answers, that such a limit holds whole."""
USUAL = 256
"""Tokens up to which no prompt and no answer is an outlier (`length_of_data`)."""
WITHOUT_ANSWERS = 64
"""Tokens of an answer where the conversations have none to go by."""
WORTH_SAYING = 0.03
"""Share of people's own answers that an explicit limit may cut without a warning."""
MOSTLY = 0.5
"""Share from which the limit is taken for the cause when no answer comes to its end."""


@dataclass(frozen=True)
class Exchanges:
    """Prompts of conversations, and people's own answers to them."""

    prompts: list[list[int]]
    """Those within the limit, as ids after which the answer begins."""
    texts: list[str]
    """The same as people read them: turns separated by ` / `, without anything that the template adds."""
    lengths: list[int]
    """Tokens of all prompts, those that were left out included."""
    answers: list[str]
    """What people answered to them; prompts without an answer have none."""


def exchanges_from(
    dialogues: Sequence[Dialogue], template: ChatTemplate, tokenizer: Tokenizer, *, limit: int = 0, most: int
) -> Exchanges:
    """Up to `most` prompts of at most `limit` tokens (0: any number): conversations that end with a user's
    turn. Each of the first three user turns of a conversation gives one prompt."""
    found = Exchanges([], [], [], [])
    for dialogue in dialogues:
        messages = dialogue.messages
        turns = [n for n, message in enumerate(messages) if message["role"] == "user"]
        for n in turns[:3]:
            ids = template.encode(messages[: n + 1], tokenizer, add_generation_prompt=True).ids
            found.lengths.append(len(ids))
            if not limit or len(ids) <= limit:
                found.prompts.append(ids)
                found.texts.append(" / ".join(described(one["content"]) for one in messages[: n + 1]))
            if n + 1 < len(messages) and messages[n + 1]["role"] == "assistant":
                found.answers.append(written(messages[n + 1]["content"]))
        if len(found.prompts) >= most:
            break
    del found.prompts[most:], found.texts[most:]
    return found


@dataclass(frozen=True)
class OwnAnswers:
    """People's own answers, beside the limit of those that are sampled."""

    limit: int
    """The setting `max_new_tokens`."""
    lengths: list[int]
    """Tokens of people's answers, their end tokens included."""
    most: int
    """The highest limit that the model's context, or memory, allows."""

    @property
    def cut(self) -> float:
        """Share of them that the limit would cut."""
        return sum(length > self.limit for length in self.lengths) / max(1, len(self.lengths))

    @property
    def enough(self) -> int:
        """The limit that holds nearly all of them."""
        return min(length_of_data(self.lengths, step=STEP, share=WHOLE, floor=USUAL) or self.limit, self.most)

    @property
    def told(self) -> str:
        """'max_new_tokens 32 cuts 44 % of the conversations' own answers (longest 131 tokens)'."""
        return (
            f"max_new_tokens {self.limit} cuts {100 * self.cut:.0f} % of the conversations' own answers "
            f"(longest {max(self.lengths, default=0):,} tokens)"
        )

    @property
    def advice(self) -> str:
        """What to set."""
        if self.enough > self.limit:
            return f"set it to {self.enough}, or to 0 for the data's length"
        whole = rounded_up(max(self.lengths, default=0), STEP)
        if whole <= self.most:
            return f"{whole} would hold all of them"
        return "the model's context, or memory, allows no more"

    @property
    def cause(self) -> str:
        """Why hardly any answer comes to its end, where the limit is the reason; else empty."""
        return f"{self.told}; {self.advice}" if self.cut >= MOSTLY else ""


@dataclass(frozen=True)
class Asked(Generic[Settings]):
    """The prompts of a stage, and its settings with the limits that hold."""

    config: Settings
    prompts: list[list[int]]
    texts: list[str]
    """The prompts as people read them."""
    cuts: Cuts
    own: OwnAnswers
    warnings: list[str] = field(default_factory=list)

    def tell(self, report: Report) -> Report:
        """The report, with what was left out of the prompts and cut of the answers."""
        report.facts |= self.facts
        report.notes += [*self.warnings, *self.cuts.notes]
        return report

    @property
    def facts(self) -> dict[str, Any]:
        """For the report's facts."""
        return {
            "prompts": len(self.prompts),
            "max_prompt_tokens": self.cuts.limit,
            "max_new_tokens": self.own.limit,
            "cut": self.cuts.facts,
            "own answers": {
                "longest": max(self.own.lengths, default=0),
                "share longer than max_new_tokens": round(self.own.cut, 4),
            },
        }


def ask(
    stage: str,
    config: Settings,
    dialogues: Sequence[Dialogue],
    base: ChatBase,
    *,
    most: int,
    plan: StagePlan | None = None,
) -> Asked[Settings]:
    """Up to `most` prompts from conversations, and the settings with the limits that hold.

    Says on the console what is left out, and what share of people's own answers would be cut. `plan` is that
    of a stage that trains on what it samples: its limits must fit into memory. Raises UserError when no
    prompt is short enough.
    """
    settings: Any = config
    context, tokenizer = base.model.config.context, base.tokenizer
    longest = min(settings.max_prompt_tokens, context - settings.max_new_tokens)
    known = settings.max_prompt_tokens and settings.max_new_tokens
    _check_room(settings.max_new_tokens, context)
    found = exchanges_from(
        dialogues, base.template, tokenizer, limit=longest if known else settings.max_prompt_tokens, most=most
    )
    lengths = _tokens(found.answers, tokenizer)
    prompt, answer, room = _limits(stage, settings, found.lengths, lengths, base, plan)
    cuts = Cuts("prompts", "max_prompt_tokens", prompt, Room(room.most - answer, _less(room, answer)), STEP)
    for length in found.lengths:
        cuts.saw(length)
    cuts.add("left out as too long", sum(length > prompt for length in found.lengths))
    both = zip(found.prompts, found.texts, strict=True)
    kept = [(ids, text) for ids, text in both if len(ids) <= prompt]
    prompts, texts = [ids for ids, _ in kept], [text for _, text in kept]
    if not prompts:
        raise UserError(_none_left(stage, found.lengths, cuts))
    own = OwnAnswers(answer, lengths, room.most - min(map(len, prompts)))
    limited = replace(settings, max_prompt_tokens=prompt, max_new_tokens=answer)
    asked = Asked(limited, prompts, texts, cuts, own)
    asked.warnings.extend(_warnings(settings, own))
    for line in [*asked.warnings, str(cuts)]:
        say(f"  {line}")
    if not asked.warnings:
        say(
            f"  answers of at most {answer} tokens; {100 * own.cut:.0f} % of the conversations' own "
            f"{len(lengths):,} are longer"
        )
    return asked


def own_answers(answers: Sequence[str], tokenizer: Tokenizer) -> int:
    """The limit that holds nearly all of these answers, in tokens; 0 when there are none."""
    return length_of_data(_tokens(answers, tokenizer), step=STEP, share=WHOLE, floor=USUAL)


def _tokens(answers: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Tokens of answers, with the token that ends them."""
    return [len(ids) + 1 for ids in tokenizer.encode_batch(answers)]


def _limits(
    stage: str,
    settings: Any,
    prompts: Sequence[int],
    answers: Sequence[int],
    base: ChatBase,
    plan: StagePlan | None,
) -> tuple[int, int, Room]:
    """The limits of a prompt and of an answer in tokens, and that of both together."""
    shape = base.model.config
    prompt = settings.max_prompt_tokens or length_of_data(prompts, step=STEP, share=WHOLE, floor=USUAL)
    answer = settings.max_new_tokens or (
        length_of_data(answers, step=STEP, share=WHOLE, floor=USUAL) or WITHOUT_ANSWERS
    )
    room = Room(shape.context, "the model's context")
    if plan is not None and not (settings.max_prompt_tokens and settings.max_new_tokens):

        def sized(tokens: int) -> Any:
            new = min(answer, max(1, tokens // 2))
            return replace(settings, max_prompt_tokens=max(1, tokens - new), max_new_tokens=new)

        room = room_for(stage, plan, shape, prompt + answer, sized, step=2 * STEP)
    if prompt + answer > room.most and not settings.max_new_tokens:
        # Answers may have half of the room, or what the prompts leave; but half of the prompts are to fit.
        middle = sorted(prompts)[len(prompts) // 2] if prompts else 0
        answer = min(answer, max(room.most - prompt, min(room.most // 2, room.most - middle), STEP))
    return min(prompt, room.most - answer), answer, room


def _check_room(answer: int, context: int) -> None:
    if answer >= context:
        raise UserError(
            f"max_new_tokens {answer} leaves no room for a prompt in the model's context of {context}: set "
            f"it to {context // 2}, or to 0 for the data's length"
        )


def _less(room: Room, answer: int) -> str:
    return f"{room.why} ({room.most:,} tokens) less max_new_tokens {answer}"


def _none_left(stage: str, lengths: Sequence[int], cuts: Cuts) -> str:
    """The error when no prompt is short enough."""
    if not lengths:
        return f"{stage}: there are no prompts: no conversation has a user's turn"
    text = f"{stage}: no prompt has at most {cuts.limit} tokens; the shortest has {min(lengths):,}"
    wanted = rounded_up(min(lengths), STEP)
    if cuts.room is None or min(lengths) <= cuts.room.most:
        return f"{text}: raise max_prompt_tokens to {wanted} or more, or set it to 0 for the data's length"
    allowed = f"{cuts.room.why} allows {cuts.room.most}"
    return f"{text}, and {allowed}: lower max_new_tokens, or shorten the prompts"


def _warnings(settings: Any, own: OwnAnswers) -> list[str]:
    """What is cut of the conversations' own answers, when it is more than `WORTH_SAYING`."""
    if own.cut <= WORTH_SAYING:
        return []
    penalty = getattr(settings, "unfinished_score", None)
    costs = "does not come to its end" if penalty is None else f"gets unfinished_score {penalty:g}"
    return [f"{own.told}: each unfinished answer {costs}; {own.advice}"]
