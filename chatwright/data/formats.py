"""Conversations in common formats -> a conversation of ours. (Comparisons and ratings: preferences.py.)

Only the columns of a record decide its format (null ones count as absent). A record that fits no format, or
more than one, is refused; a `format` in the settings decides instead.

* `messages` or `conversations`, a list of {"role", "content"}: `openai`. Our own records are the same with an
  `id`, which is made anew.
* `messages` or `conversations`, a list of {"from", "value"}: `sharegpt`. human is the user, gpt the assistant
  (`SPEAKERS`).
* `instruction` and `output` (and `input`): `alpaca`, one exchange. The user's turn is Alpaca's standard
  prompt. With the format `alpaca-plain`, which is never chosen by itself, it is the instruction, a blank line
  and the input.
* `prompt` and `completion`: `prompt-completion`, as TRL has them: both texts, or both lists of messages. A
  text is the user's turn, and the assistant's. `question` stands for prompt, `response` and `answer` for
  completion.
  Answers inside a prompt are read and not learnt, as in TRL.
* `prompt` (or `question`) alone: `prompt-only`, a conversation without an answer. PPO takes it as a prompt.

A text in a column `system` stands before the conversation as its system message. OpenAI's `tool_calls`,
`tool_call_id` and `reasoning_content`, and ShareGPT's `function_call` (JSON with name and arguments),
become parts of contents (messages.py). Answers that are marked as not to be learnt stay, and are not learnt
(marks.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from chatwright.data import marks
from chatwright.data.examples import Dialogue
from chatwright.data.shapes import ANSWERED, ASKED, LISTS, columns_of, hint
from chatwright.messages import (
    Message,
    Part,
    ToolCallPart,
    check_message,
    is_text,
    kind_of,
    parts_of,
    text_of,
)

Format = Literal["auto", "openai", "sharegpt", "alpaca", "alpaca-plain", "prompt-completion", "prompt-only"]
"""Format of conversations; `auto` looks at the columns of each record."""
MORE_THAN_PROMPTS = (
    "completions",
    "responses",
    "chosen",
    "rejected",
    "instruction",
    "output",
    "text",
    "label",
)
"""A record with one of these columns beside a prompt is no prompt alone."""
LOST = ("context", "input", "history")
"""Columns beside a prompt and its completion that belong to the prompt, and that we cannot put into it."""
HH = re.compile(r"\n\n(Human|Assistant):")
"""How turns begin in Anthropic's helpful-harmless data (Bai et al. 2022)."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
"""ShareGPT's `from` -> role."""
STRUCTURED = ("function_call", "audio")
"""Fields of OpenAI's messages that ours do not have."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023) for an instruction without an input."""
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response "
    "that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The same for an instruction with an input."""


def dialogue(row: Mapping[str, Any], format: Format = "auto", column: str = "") -> Dialogue:
    """The conversation of a record. `column` names the list of messages where it has another name.

    Raises ValueError: no format fits, or more than one; a message that cannot be one; nothing to learn from
    it.
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is none of {', '.join(get_args(Format))}")
    if format == "auto":
        format = _format_of(row, column)
    if format in ("alpaca", "alpaca-plain"):
        return _marked(row, _alpaca(row, plain=format == "alpaca-plain"))
    if format in ("prompt-completion", "prompt-only"):
        return _marked(row, *_exchange(row, answered=format == "prompt-completion"))
    name = _list_column(row, column)
    messages = turns_of(row, name, format)
    return _marked(row, under_system(row, messages), unlearnt_of(row, name, messages), before=len(messages))


def _marked(
    row: Mapping[str, Any], messages: list[Message], unlearnt: Collection[int] = (), *, before: int = 0
) -> Dialogue:
    """The conversation. `unlearnt` are the numbers of answers that are not to be learnt, among the last
    `before` messages; marks beside the messages, and our own records' `unlearnt`, add to them."""
    shift = len(messages) - before if before else 0
    listed = marks.unlearnt_by_lists(row, before)
    numbers = {number + shift for number in (*unlearnt, *listed)}
    own = {number for number, message in enumerate(messages) if message["role"] == "assistant"}
    return Dialogue.of(messages, numbers & own if marks.is_learnt_at_all(row) else own)


def unlearnt_of(row: Mapping[str, Any], column: str, messages: Sequence[Message]) -> set[int]:
    """The numbers of the answers in a column that are not to be learnt. Raises ValueError for marks that
    cannot be followed."""
    assistants = [message["role"] == "assistant" for message in messages]
    own = row.get("unlearnt") if column == "messages" else None
    known = set(own) if isinstance(own, list) and all(type(one) is int for one in own) else set()
    return marks.unlearnt_in(row[column], assistants) | known


def wanted_of_others(row: Mapping[str, Any]) -> int:
    """How many turns of the user, of tools or of the system are marked as to be learnt; none is."""
    lists = [value for value in row.values() if isinstance(value, list)]
    turns = [turn for one in lists for turn in one if isinstance(turn, Mapping)]
    others = [turn for turn in turns if SPEAKERS.get(str(turn.get("from", turn.get("role")))) != "assistant"]
    return sum(marks.is_wanted(turn) for turn in others if present(turn, "from", "role"))


def present(row: Mapping[str, Any], *names: str) -> list[str]:
    """The named columns that are not null; Parquet and the hub fill absent ones with null."""
    return [name for name in names if row.get(name) is not None]


def _format_of(row: Mapping[str, Any], column: str) -> Format:
    """The format of a record, `auto` for a list of messages. Raises ValueError when it has the columns of two
    formats, or looks like records of another kind."""
    if column:
        return "auto"
    lists, asked = present(row, *LISTS), present(row, *ASKED)
    alpaca = present(row, "instruction", "output")
    answered = present(row, *ANSWERED) if asked else []
    fits: dict[Format, list[str]] = {
        "alpaca": alpaca if len(alpaca) == 2 else [],
        "prompt-completion": [*asked, *answered] if answered else [],
        "auto": lists,
    }
    found = {format: names for format, names in fits.items() if names}
    if len(found) > 1:
        named = " and ".join(", ".join(names) for names in found.values())
        raise ValueError(f"columns of two formats: {named}; choose one by `format`, or by #column")
    if "prompt-completion" in found and present(row, "label"):
        raise ValueError(f"these are no conversations{hint(row, 'dialogues')}")
    if asked and not found and not present(row, *MORE_THAN_PROMPTS):
        return "prompt-only"
    return next(iter(found), "auto")


def one_of(row: Mapping[str, Any], names: Sequence[str], wanted: str) -> str:
    """The one of these columns that is there. Raises ValueError unless there is exactly one."""
    found = present(row, *names)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"both of the columns {', '.join(found)}; choose one: FILE#{names[0]}={found[0]}")
    raise ValueError(f"no column {names[0]!r}; the columns found are: {columns_of(row)}{hint(row, wanted)}")


def _list_column(row: Mapping[str, Any], column: str) -> str:
    """The column with the messages. Raises ValueError unless there is exactly one."""
    found = [column] if column else present(row, *LISTS)
    if len(found) == 1 and found[0] in row:
        return found[0]
    if len(found) > 1:
        raise ValueError(f"both of the columns {', '.join(found)}; choose one by #column")
    others = "'conversations', 'prompt' and 'completion', or 'instruction' and 'output'"
    wanted = repr(column) if column else f"'messages' (or {others})"
    raise ValueError(f"no column {wanted}; the columns found are: {columns_of(row)}{hint(row, 'dialogues')}")


def turns_of(row: Mapping[str, Any], column: str, format: Format = "auto") -> list[Message]:
    """The messages in a column, in OpenAI's or ShareGPT's format."""
    listed = row[column]
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        text = " text or" if column in (*ASKED, *ANSWERED) else ""
        raise ValueError(f"{column} must be{text} a list of messages, found {kind_of(listed)}")
    if not listed:
        raise ValueError(f"{column} is empty")
    if format == "auto":
        format = _way(listed[0])
    return [_said(turn) if format == "sharegpt" else _message(turn) for turn in listed]


def _way(turn: Any) -> Format:
    """The format of a list of messages, from its first message."""
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"a message must be an object with role and content, found {type(turn).__name__} {turn!r:.40}"
        )
    found = present(turn, "role", "from")
    if len(found) != 1:
        raise ValueError(
            "a message has both role and from"
            if found
            else "a message has neither role (and content) nor from (and value)"
        )
    return "openai" if found == ["role"] else "sharegpt"


def _message(turn: Any) -> Message:
    """A message in OpenAI's format or in ours; `developer` is a system message, and text parts are joined.

    Tool calls, tool results and thinking become parts. Images and what is in `STRUCTURED` are refused.
    """
    if not isinstance(turn, Mapping):
        return check_message(turn)
    if found := [name for name in STRUCTURED if turn.get(name)]:
        raise ValueError(
            f"a message has {found[0]}, which is not read: write calls as tool_calls, or leave it out"
        )
    role = "system" if turn.get("role") == "developer" else turn.get("role")
    checked = check_message({**turn, "role": role})
    content = checked["content"]
    if any(part["type"] == "image" for part in parts_of(content)):
        raise ValueError(
            "a message's content holds an image, and models here learn from text only: leave the record out"
        )
    return Message(role=checked["role"], content=text_of(content) if is_text(content) else content)


def _said(turn: Any) -> Message:
    """A message in ShareGPT's format."""
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"a message must be an object with from and value, found {type(turn).__name__} {turn!r:.40}"
        )
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"a message is from {speaker!r}; known: {', '.join(SPEAKERS)}")
    value = turn.get("value")
    return check_message(
        {"role": SPEAKERS[speaker], "content": _called(value) if speaker == "function_call" else value}
    )


def _called(value: Any) -> list[Part]:
    """The calls in a `function_call` of ShareGPT: a JSON object with name and arguments, or a list of
    them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    parts: list[Part] = []
    for call in found if isinstance(found, list) and found else [found]:
        name, arguments = (
            (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(arguments, Mapping | str):
            raise ValueError(
                f'a function_call must be JSON like {{"name": ..., "arguments": ...}}, found {value!r:.80}'
            )
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(ToolCallPart(type="tool_call", id="", name=name, arguments=text))
    return parts


def under_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The conversation, preceded by the system message of the column `system`, if there is one."""
    system = row.get("system")
    if system in (None, ""):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("a column `system`, and a system message in the conversation as well")
    return [check_message({"role": "system", "content": system}), *messages]


def _alpaca(row: Mapping[str, Any], *, plain: bool) -> list[Message]:
    """One exchange from instruction, input and output."""
    parts = {name: row.get(name) for name in ("instruction", "input", "output")}
    parts["input"] = parts["input"] or ""
    for name, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{name} must be text, found {'nothing (null)' if value is None else type(value).__name__}"
            )
        if name != "input" and not value.strip():
            raise ValueError(f"{name} is empty")
    if row.get("history"):
        raise ValueError(
            "earlier turns in a column `history` are not read: write such conversations as `messages`"
        )
    if plain:
        asked = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    else:  # not str.format: the texts may hold braces
        prompt = ALPACA_INPUT if parts["input"] else ALPACA
        asked = re.sub(r"\{(instruction|input)\}", lambda found: str(parts[found[1]]), prompt)
    turns: list[Message] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": str(parts["output"])},
    ]
    return under_system(row, turns)


# ---- prompts and completions -------------------------------------------------------------------------------


def _exchange(row: Mapping[str, Any], *, answered: bool) -> tuple[list[Message], set[int]]:
    """A prompt and its completion, or the prompt alone; and the numbers of answers that are not to be learnt:
    those in the prompt, of which TRL too learns nothing, and the marked ones."""
    lost = [name for name in LOST if row.get(name)]
    if lost:
        raise ValueError(
            f"a column `{lost[0]}` stands beside the prompt and would be lost: write such records as "
            "`messages`, or leave it out on purpose by FILE#prompt=COLUMN,completion=COLUMN"
        )
    prompt = under_system(row, prompt_of(row, "dialogues"))
    name = one_of(row, ANSWERED, "dialogues") if answered else ""
    said = answer_of(row, name) if answered else []
    unlearnt = {number for number, one in enumerate(prompt) if one["role"] == "assistant"} if said else set()
    if said and not isinstance(row[name], str):
        unlearnt |= {number + len(prompt) for number in unlearnt_of(row, name, said)}
    return [*prompt, *said], unlearnt


def prompt_of(row: Mapping[str, Any], wanted: str) -> list[Message]:
    """The conversation up to the answer: a text is the user's turn, or turns in Anthropic's way. `wanted` is
    the setting that reads the record. Raises ValueError."""
    name = one_of(row, ASKED, wanted)
    prompt = row[name]
    if not isinstance(prompt, str):
        return turns_of(row, name)
    if HH.match(prompt):
        return spoken(prompt.removesuffix("\n\nAssistant:"))
    if not prompt.strip():
        raise ValueError(f"{name} is empty")
    return [{"role": "user", "content": prompt}]


def answer_of(row: Mapping[str, Any], name: str) -> list[Message]:
    """The answer in a column: a text is the assistant's turn. Raises ValueError."""
    answer = row[name]
    if not isinstance(answer, str):
        return turns_of(row, name)
    if not answer.strip():
        raise ValueError(f"{name} is empty")
    return [{"role": "assistant", "content": without_space(answer)}]


def without_space(answer: str) -> str:
    """A text without the one space before it that parts it from the prompt in TRL's standard form."""
    return answer.removeprefix(" ")


def spoken(text: str) -> list[Message]:
    """A text of turns that begin with Human: and Assistant: as messages. Raises ValueError."""
    before, *parts = HH.split(text)
    if before.strip() or not parts:
        raise ValueError(
            'without a column "prompt", texts must begin with "\\n\\nHuman:" (messages are another way)'
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns
    ]
