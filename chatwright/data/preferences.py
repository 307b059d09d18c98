"""What people preferred, in common formats -> a comparison of answers, or a text with a rating.

As in formats.py, only the columns of a record decide its format. `prompt` may also be called `question`, and
a text in a column `system` stands before it.

Comparisons, with a column `annotator` where the annotator is known:

* `responses` and `scores`, with `prompt`: `ranked`, K answers. Higher scores are preferred, equal ones tie.
* `chosen` and `rejected`, with `prompt`: `pairs`, scores 1 and 0. The answers are texts, or messages behind
  the prompt, which they may repeat.
* `chosen` and `rejected` alone: `pairs`. Both are lists of messages whose beginning is the same; or texts of
  turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:"; or other texts, whose common beginning is the
  prompt (as in TRL).

A prompt is a text (the user's turn; or such turns) or a list of messages.

Ratings:

* `text` and `label`, a number (true is 1, false is 0).
* `prompt`, `completion` and `label`: TRL's unpaired preferences. The completion is the text. The prompt is
  not used: a rated text stands behind prompts of the conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from chatwright.data.examples import Comparison, LabelledText
from chatwright.data.formats import (
    HH,
    answer_of,
    one_of,
    present,
    prompt_of,
    spoken,
    turns_of,
    under_system,
    without_space,
)
from chatwright.data.marks import refuse_unlearnt
from chatwright.data.shapes import ANSWERED, ASKED, columns_of, hint
from chatwright.messages import Message, written

PreferenceFormat = Literal["auto", "ranked", "pairs"]
"""Format of comparisons; `auto` looks at the columns of each record."""
FEWEST_WORDS = 2
"""A common beginning of fewer words is taken for chance, not for a prompt."""
TRUTH = {"true": 1.0, "false": 0.0}


def comparison(row: Mapping[str, Any], format: PreferenceFormat = "auto") -> Comparison:
    """The comparison of a record. Raises ValueError as `formats.dialogue` does."""
    if format not in get_args(PreferenceFormat):
        raise ValueError(f"format {format!r} is none of {', '.join(get_args(PreferenceFormat))}")
    ranked, pair = (
        len(present(row, *names)) == 2 for names in (("responses", "scores"), ("chosen", "rejected"))
    )
    if format == "auto":
        if ranked and pair:
            raise ValueError(
                "columns of two formats: responses, scores and chosen, rejected; choose one by `format`"
            )
        if not ranked and not pair:
            raise _lacks(row, "'responses' and 'scores', or 'chosen' and 'rejected'")
        format = "ranked" if ranked else "pairs"
    elif not (ranked if format == "ranked" else pair):
        raise _lacks(row, "'responses' and 'scores'" if format == "ranked" else "'chosen' and 'rejected'")
    annotator = _annotator(row)
    refuse_unlearnt(row, "chosen", "rejected")
    if format == "ranked":
        prompt = under_system(row, prompt_of(row, "comparisons"))
        return Comparison.of(prompt, row["responses"], row["scores"], annotator)
    prompt, answers = _pair(row)
    return Comparison.of(under_system(row, prompt), answers, (1.0, 0.0), annotator)


def _lacks(row: Mapping[str, Any], wanted: str) -> ValueError:
    """The error for a record without the columns of a format."""
    return ValueError(
        f"no columns {wanted}; the columns found are: {columns_of(row)}{hint(row, 'comparisons')}"
    )


def _annotator(row: Mapping[str, Any]) -> str:
    """The annotator; numbers count as names."""
    found = row.get("annotator")
    if isinstance(found, bool) or not isinstance(found, str | int | None):
        raise ValueError(f"annotator must be a name or a number, found {type(found).__name__}")
    return "" if found is None else str(found)


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    """The prompt and both answers, the preferred one first."""
    kinds = {name: isinstance(row[name], str) for name in ("chosen", "rejected")}
    if len(set(kinds.values())) == 2:
        raise ValueError("one of chosen and rejected is a text, the other is not")
    texts = all(kinds.values())
    given = prompt_of(row, "comparisons") if present(row, *ASKED) else None
    if texts and given is not None:
        prompt = row[present(row, *ASKED)[0]]
        turns = isinstance(prompt, str) and HH.match(prompt)
        return given, [row[name].strip() if turns else without_space(row[name]) for name in kinds]
    if texts and not all(HH.match(row[name]) for name in kinds):
        return _common_beginning(row["chosen"], row["rejected"])
    whole = [spoken(row[name]) if texts else turns_of(row, name) for name in kinds]
    ends = [_behind(turns, given) for turns in whole]
    if given is None and whole[0][:-1] != whole[1][:-1]:
        raise ValueError(
            "chosen and rejected differ before their last message: they do not answer the same prompt"
        )
    return given if given is not None else whole[0][:-1], ends


def _common_beginning(chosen: str, rejected: str) -> tuple[list[Message], list[str]]:
    """The prompt inside two texts: their common beginning, up to the end of a word; and what follows it."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((n for n, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if any(text[end : end + 1] not in ("", " ", "\n") for text in (chosen, rejected)):
        end = max(chosen.rfind(" ", 0, end), chosen.rfind("\n", 0, end), 0)
    prompt = chosen[:end].strip()
    if len(prompt.split()) < FEWEST_WORDS:
        raise ValueError(
            "without a column 'prompt', two texts must begin alike, with the prompt; these begin with "
            f"{chosen[:20]!r} and {rejected[:20]!r}: write the prompt into a column `prompt`"
        )
    return [{"role": "user", "content": prompt}], [text[end:].strip() for text in (chosen, rejected)]


def _behind(turns: list[Message], prompt: list[Message] | None) -> str:
    """The answer at the end of a conversation that may repeat the prompt."""
    if prompt is None:
        if len(turns) < 2:
            raise ValueError(
                "without a column 'prompt', chosen and rejected must hold it before their last message"
            )
        left = turns[-1:]
    else:
        repeated = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
        left = turns[len(prompt) :] if repeated else turns
    if len(left) != 1 or left[0]["role"] != "assistant":
        told = ", ".join(turn["role"] for turn in left) or "nothing"
        raise ValueError(f"behind the prompt there must be one message of the assistant, found: {told}")
    return written(left[0]["content"])


# ---- ratings -----------------------------------------------------------------------------------------------


def rated_text(row: Mapping[str, Any], column: str = "") -> LabelledText:
    """The text of a record with its rating. `column` names the text where it has another name. Raises
    ValueError."""
    name = column or "text"
    if name not in row and (column or not present(row, *ANSWERED)):
        raise _no_rating(row, name)
    if row.get("label") is None and "label" not in row:
        raise _no_rating(row, "label")
    label = _number(row["label"])
    refuse_unlearnt(row, *ANSWERED)
    if name in row and (row[name] is not None or not present(row, *ANSWERED)):
        return LabelledText.of(row[name], label)
    turns = answer_of(row, one_of(row, ANSWERED, "ratings"))
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"the completion must end with a message of the assistant, not {turns[-1]['role']}")
    return LabelledText.of(written(turns[-1]["content"]), label)


def _no_rating(row: Mapping[str, Any], name: str) -> ValueError:
    return ValueError(f"no column {name!r}; the columns found are: {columns_of(row)}{hint(row, 'ratings')}")


def _number(label: Any) -> Any:
    """A label as a number: true and false are 1 and 0, and in texts, as .csv files have them, stand numbers.
    What is none is left for `LabelledText` to refuse."""
    if isinstance(label, bool):
        return float(label)
    if not isinstance(label, str):
        return label
    word = label.strip().lower()
    try:
        return TRUTH[word] if word in TRUTH else float(word)
    except ValueError:
        raise ValueError(f"label must be a number, found {label!r:.40}; higher is better") from None
