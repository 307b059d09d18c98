"""Marks of messages as not to be learnt, in the formats that have them.

| mark of a message | whose | not learnt where it is |
|---|---|---|
| `weight` | OpenAI, mistral-finetune, Together, Fireworks | 0 |
| `train`, `training` | axolotl (`message_field_training`) | false |
| `loss`, `loss_scale` | ms-swift, ChatGLM3 | false, 0 |
| `trainable`, `loss_mask`, `loss_weight`, `train_on_turn`, `learn` | verl; others | false, 0 |
| `masked`, `ignore_loss` | torchtune; others | true |

A marked answer stays in the conversation: the model reads it, and does not learn to write it. `weight`, and
the others where they are true or false, may also stand beside the list of messages; they then hold for all
of its answers. A list `loss_mask` beside them has one entry a message (LLaMA-Factory). What cannot be done is
refused by name: to learn an answer by half, or parts of it (`train_detail`), or a mark of which nobody can
say what it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LEARNT = (
    "weight",
    "loss_weight",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "message_field_training",
    "loss",
    "loss_scale",
    "loss_mask",
    "learn",
)
"""Marks that are true where a message is learnt."""
NOT_LEARNT = ("masked", "ignore_loss")
"""Marks that are true where it is not."""
PARTS = ("train_detail", "training_detail", "message_field_training_detail")
"""Marks of parts of a message, by their characters (axolotl's `message_field_training_detail`)."""
BY_MESSAGE = ("loss_mask", "train_mask", "weights")
"""Lists beside the messages that say it of each message; 1 is learnt."""
BY_TOKEN = ("completion_mask", "assistant_masks", "assistant_mask")
"""Lists beside the messages that say it of each token."""
UNKNOWN = re.compile("(?:^|[_-])(?:un|no)?(?:train|loss|mask|weight|learn|supervis)", re.IGNORECASE)
"""Names of fields that may be marks."""
USUAL = frozenset(("role", "content", "from", "value", "name", "tool_calls", "tool_call_id"))
"""Fields that nearly all messages have; they are no marks."""
WORDS = {
    "true": True,
    "yes": True,
    "1": True,
    "1.0": True,
    "false": False,
    "no": False,
    "0": False,
    "0.0": False,
}
ROLES = ("user", "human", "system", "tool", "observation")
"""What NeMo's column `mask` may name: turns of which none is learnt anyway."""
FIX = "leave it out, or mark whole answers: true or false, 1 or 0"


def truth(value: Any) -> bool | None:
    """What a mark says; None for a value that says neither yes nor no."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    return WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether an answer is to be learnt, by its marks. Raises ValueError naming a mark that asks for more
    than yes or no."""
    _refuse_parts(turn)
    learnt = True
    for name, value in turn.items():
        if name in USUAL or value is None or value == "":
            continue
        if name in LEARNT or name in NOT_LEARNT:
            found = truth(value)
            if found is None:
                raise ValueError(
                    f"a message has {name} {value!r:.40}: an answer is learnt or not, nothing between; {FIX}"
                )
            learnt &= found if name in LEARNT else not found
        elif UNKNOWN.search(str(name)) and not _says_nothing(str(name), value):
            raise ValueError(
                f"a message has {name} {value!r:.40}, which may say that it is not to be learnt; marks that "
                f"are known: {', '.join((*LEARNT, *NOT_LEARNT))}; rename it, or leave it out"
            )
    return learnt


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field with the name of a mark is none, or says what holds anyway."""
    if name.lower() == "mask":  # 1 stands for "learnt" in some formats, and for "not learnt" in others
        return False
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        return True
    return truth(value) is True


def _refuse_parts(turn: Mapping[str, Any]) -> None:
    """Raise ValueError where parts of a message are marked."""
    for name in PARTS:
        if turn.get(name):
            raise ValueError(f"a message has {name}: learning some of its characters is not supported; {FIX}")
    content = turn.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        if isinstance(part, Mapping) and not is_learnt({key: part[key] for key in part if key in _MARKS}):
            raise ValueError(f"a part of a message's content is marked as not to be learnt; {FIX}")


_MARKS = (*LEARNT, *NOT_LEARNT)


def is_wanted(turn: Mapping[str, Any]) -> bool:
    """Whether a turn of somebody else than the assistant is marked as to be learnt, which none is. `weight`
    says nothing there: by OpenAI's rules only answers have one."""
    return any(truth(turn[name]) or (name in PARTS and turn[name]) for name in turn.keys() & _WANTED)


_WANTED = {*LEARNT, *PARTS} - {"weight", "loss_weight"}


def is_learnt_at_all(row: Mapping[str, Any]) -> bool:
    """Whether anything of a record is to be learnt, by the marks beside its messages. Raises ValueError as
    `is_learnt`, and for marks of single tokens."""
    for name in BY_TOKEN:
        if isinstance(row.get(name), list | tuple) and row[name]:
            raise ValueError(f"a column `{name}` says of each token what is learnt, which is not read: {FIX}")
    mask = row.get("mask")
    named = [one.strip().lower() for one in mask.split(",")] if isinstance(mask, str) else []
    if any(one and one not in ROLES for one in named):
        raise ValueError(f"a column `mask` with {mask!r:.40} is not read: mark messages by train: false")
    given = {name: row[name] for name in row.keys() & {*_MARKS} if _is_mark(name, row[name])}
    try:
        return is_learnt(given)
    except ValueError as error:
        raise ValueError(str(error).replace("a message has", "the record has")) from None


def unlearnt_by_lists(row: Mapping[str, Any], messages: int) -> set[int]:
    """The numbers of messages, of so many, that a list beside them says are not to be learnt. Raises
    ValueError for a list that is not one of 0 and 1, an entry a message."""
    found: set[int] = set()
    for name in BY_MESSAGE:
        listed = row.get(name)
        if not isinstance(listed, list | tuple) or not listed:
            continue
        said = [truth(one) for one in listed]
        if len(said) != messages or None in said:
            raise ValueError(
                f"a column `{name}` has {len(said)} entries, for {messages} messages; it is read with one "
                "entry a message, 1 for learnt and 0 for not: leave it out, or mark messages by train: false"
            )
        found |= {number for number, learnt in enumerate(said) if not learnt}
    return found


def _is_mark(name: str, value: Any) -> bool:
    """Whether a column beside the messages is a mark: others are called `loss` or `train`, too. `weight` is
    one with any number."""
    if name == "weight" and isinstance(value, str):
        return truth(value) is not None or value.strip().replace(".", "", 1).isdigit()
    numbers = bool | int | float if name == "weight" else bool
    return isinstance(value, numbers) or (isinstance(value, str) and truth(value) is not None)


def unlearnt_in(turns: Sequence[Any], assistants: Sequence[bool]) -> set[int]:
    """The numbers of the answers, among these turns, that are not to be learnt. Raises ValueError as
    `is_learnt`."""
    return {
        number
        for number, (turn, own) in enumerate(zip(turns, assistants, strict=True))
        if own and isinstance(turn, Mapping) and not is_learnt(turn)
    }


def refuse_unlearnt(row: Mapping[str, Any], *columns: str) -> None:
    """Raise ValueError where a judgement is marked as not to be learnt, or the answer in one of these columns
    is: a judgement is learnt whole."""
    if not is_learnt_at_all(row):
        raise ValueError("the record is marked as not to be learnt: leave it out")
    for name in columns:
        turns = row.get(name)
        last = turns[-1] if isinstance(turns, list | tuple) and turns else None
        if isinstance(last, Mapping) and not is_learnt(last):
            raise ValueError(f"the answer in {name} is marked as not to be learnt: leave the record out")
