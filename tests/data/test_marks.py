"""Answers that are marked as not to be learnt: context, never in the loss; or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatwright import cli
from chatwright.chat import NATIVE, ChatTemplate
from chatwright.config import UserError
from chatwright.data import marks
from chatwright.data.chat_rows import check_end_is_learnt, conversations_of, rows_of
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.formats import dialogue
from chatwright.data.reading import Faults
from chatwright.data.records import read_records
from chatwright.data.sources import comparisons, dialogues, documents, labelled_texts
from chatwright.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a"], 264)
GREETING = ChatTemplate("{{ '<|tool|>' }}" + NATIVE.source, end="<|end|>")
SECRET = "zzz"
MARKS: tuple[dict[str, Any], ...] = (
    {"weight": 0},
    {"weight": 0.0},
    {"weight": "0"},
    {"train": False},
    {"training": False},
    {"train": "false"},
    {"loss": False},
    {"loss": 0},
    {"loss_scale": 0.0},
    {"loss_mask": 0},
    {"loss_weight": 0},
    {"trainable": False},
    {"train_on_turn": False},
    {"learn": False},
    {"masked": True},
    {"ignore_loss": True},
    {"train": True, "weight": 0},
)


def talk(mark: dict[str, Any], *, sharegpt: bool = False) -> list[dict[str, Any]]:
    """Two exchanges, the first answer with the mark."""
    names = ("from", "value", "human", "gpt") if sharegpt else ("role", "content", "user", "assistant")
    turns = [(2, "q", {}), (3, SECRET, mark), (2, "r", {}), (3, "aaaa", {})]
    return [{names[0]: names[who], names[1]: text, **more} for who, text, more in turns]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("mark", MARKS, ids=str)
@pytest.mark.parametrize("sharegpt", [False, True], ids=["openai", "sharegpt"])
def test_a_marked_answer_is_known(mark: dict[str, Any], sharegpt: bool) -> None:
    found = dialogue({"conversations": talk(mark, sharegpt=sharegpt)})
    assert found.unlearnt == (1,) and found.answers == [3]
    assert found.messages == dialogue({"messages": talk({})}).messages
    assert found.id == dialogue({"messages": talk({})}).id
    assert Dialogue.from_json(found.to_json()) == found
    with_system = dialogue({"messages": talk(mark, sharegpt=sharegpt), "system": "s"})
    assert with_system.unlearnt == (2,)
    assert dialogue(json.loads(found.to_json())) == found  # our own records as a source


@pytest.mark.parametrize(
    "mark",
    [
        {},
        {"weight": 1},
        {"weight": None},
        {"train": True},
        {"loss": 1.0},
        {"masked": False},
        {"name": "bot"},
        {"do_train": True},
        {"training_set": "a"},
        {"loss": ""},
        {"constraint": False},
        {"train_id": 12},
    ],
    ids=str,
)
def test_what_says_nothing_changes_nothing(mark: dict[str, Any]) -> None:
    found = dialogue({"messages": talk(mark)})
    assert found.unlearnt == () and "unlearnt" not in found.to_json()


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ({"weight": 0.5}, "a message has weight 0.5: an answer is learnt or not, nothing between"),
        ({"loss_scale": 2.0}, "a message has loss_scale 2.0"),
        ({"train": "half"}, "a message has train 'half'"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]},
            "a message has train_detail",
        ),
        ({"training_detail": [{}]}, "a message has training_detail: learning some of its characters is not"),
        ({"do_train": False}, "a message has do_train False, which may say that it is not to be learnt"),
        ({"no_loss": 0}, "a message has no_loss 0, which may say"),
        (
            {"mask": 1},
            "a message has mask 1, which may say that it is not to be learnt; marks that are known: we",
        ),
        (
            {"content": [{"type": "text", "text": "a", "train": False}]},
            "a part of a message's content is marked",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(mark: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": talk(mark)})
    with pytest.raises(UserError) as error:
        list(dialogues(str(file)))
    assert f"{file}:1: {said}" in str(error.value)
    faults = Faults(skip=True)
    assert (
        len(
            list(dialogues(str(write(file, {"messages": talk(mark)}, {"messages": talk({})})), faults=faults))
        )
        == 1
    )
    assert faults.count == 1


@pytest.mark.parametrize(
    "row",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": "0"}, {"masked": True}],
    ids=str,
)
def test_a_mark_beside_the_messages_holds_for_all_answers(row: dict[str, Any]) -> None:
    assert dialogue({"messages": talk({}), **row}).answers == []
    assert dialogue({"instruction": "a", "output": "b", **row}).answers == []
    assert dialogue({"prompt": "a", "completion": "b", **row}).answers == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"weight": 0.5}, "the record has weight 0.5"),
        (
            {"loss_mask": [0, 1]},
            "a column `loss_mask` has 2 entries, for 4 messages; it is read with one entry",
        ),
        ({"weights": [0, 1, 0, 0.5]}, "a column `weights` has 4 entries, for 4 messages"),
        ({"completion_mask": [0, 1]}, "a column `completion_mask` says of each token"),
        ({"mask": "Assistant"}, "a column `mask` with 'Assistant' is not read"),
    ],
)
def test_columns_that_cannot_be_followed(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        dialogue({"messages": talk({}), **row})


def test_a_list_beside_the_messages_has_one_entry_a_message() -> None:
    """As LLaMA-Factory's `loss_mask`."""
    row = {"messages": talk({}), "loss_mask": [0, 0, 0, 1]}
    assert dialogue(row).unlearnt == (1,) and dialogue({**row, "system": "s"}).unlearnt == (2,)
    assert dialogue({"conversations": talk({}, sharegpt=True), "loss_mask": [1, 1, 1, 1]}).unlearnt == ()


@pytest.mark.parametrize("row", [{"mask": "User"}, {"loss": 2.3}, {"train": "split"}, {"weight": 1}], ids=str)
def test_columns_that_say_nothing(row: dict[str, Any]) -> None:
    assert dialogue({"messages": talk({}), **row}).unlearnt == ()


def test_answers_in_a_prompt_are_context_as_in_trl() -> None:
    turns = talk({})
    found = dialogue({"prompt": turns[:3], "completion": turns[3:]})
    assert found.unlearnt == (1,) and found.answers == [3]
    marked = dialogue({"prompt": turns[:3], "completion": [{**turns[3], "weight": 0}]})
    assert marked.answers == []
    assert dialogue({"prompt": turns[:3]}).unlearnt == ()  # nothing of it is learnt: PPO answers it
    assert dialogue({"prompt": "a", "completion": "b"}).unlearnt == ()


def test_judgements_that_are_marked_are_refused(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "x", "train": False}]
    for row in (
        {"prompt": "p", "chosen": answer, "rejected": [{"role": "assistant", "content": "y"}]},
        {"prompt": "p", "chosen": "x", "rejected": "y", "weight": 0.5},
        {"prompt": "p", "chosen": "x", "rejected": "y", "train": False},
    ):
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*(marked as not to be learnt|has weight 0\.5)"):
            list(comparisons(str(write(tmp_path / "a.jsonl", row))))
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*the answer in completion is marked"):
        list(
            labelled_texts(
                str(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": answer, "label": 1}))
            )
        )


def test_as_text_a_conversation_has_no_marked_answers(tmp_path: Path) -> None:
    file, faults = write(tmp_path / "a.jsonl", {"messages": talk({"weight": 0})}), Faults()
    (found,) = documents(str(file), faults=faults)
    assert found.text == "q\nr\naaaa" and found.id == dialogue({"messages": talk({})}).id
    assert faults.wanted_line() == "1 answers that are marked as not to be learnt are no part of the texts"


def test_turns_of_others_that_are_to_be_learnt_are_counted(tmp_path: Path) -> None:
    turns = talk({})
    file, faults = (
        write(tmp_path / "a.jsonl", {"messages": [{**turns[0], "train": True}, turns[1]]}),
        Faults(),
    )
    assert next(iter(dialogues(str(file), faults=faults))).unlearnt == ()
    assert (
        faults.wanted_line()
        == "1 turns of users, tools or the system are marked as to be learnt; only answers are"
    )
    assert not marks.is_wanted(
        {"role": "user", "content": "x", "weight": 1}
    )  # OpenAI: answers alone have one
    assert not marks.is_wanted({"role": "user", "content": "x", "train": False})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"unlearnt": [0]}, "unlearnt names message 0, which is not the assistant's"),
        ({"unlearnt": [4]}, "unlearnt must hold numbers of messages"),
        ({"unlearnt": [True]}, "unlearnt must hold numbers of messages"),
        ({"unlearnt": "1"}, "unlearnt must be a list"),
    ],
)
def test_a_damaged_record(fields: dict[str, Any], said: str) -> None:
    record = {"id": "x", "messages": talk({}), **fields}
    with pytest.raises(ValueError, match=said):
        Dialogue.from_json(json.dumps(record))


# ---- rows --------------------------------------------------------------------------------------------------


def learnt_text(file: Path, template: ChatTemplate, length: int = 100) -> str:
    rows = rows_of(file, template, TOKENIZER, length, packing=True)
    learnt = [token for row in rows for token, flag in zip(row.ids, row.mask, strict=True) if flag]
    check_end_is_learnt(rows, template, TOKENIZER)
    assert TOKENIZER.decode([token for row in rows for token in row.ids]).count(SECRET) == len(rows)
    return TOKENIZER.decode([one for one in learnt if one not in TOKENIZER.control_ids.values()])


@pytest.mark.parametrize("template", [NATIVE, GREETING], ids=["concatenates", "greeting"])
def test_a_marked_answer_is_read_and_not_learnt(template: ChatTemplate, tmp_path: Path) -> None:
    file = tmp_path / "dialogues-train.jsonl"
    file.write_text(Dialogue.of([*dialogue({"messages": talk({})}).messages], [1]).to_json() + "\n")
    assert learnt_text(file, template) == "aaaa"
    assert learnt_text(tmp_path / "dialogues-train.jsonl", template, 200) == "aaaa"
    (one,) = conversations_of(file, template, TOKENIZER)
    assert one.whole is not None and sum(one.whole.mask) == 5  # the answer and its end token
    file.write_text(Dialogue.of([*dialogue({"messages": talk({})}).messages]).to_json() + "\n")
    assert learnt_text(file, template) == f"{SECRET}aaaa"


def test_a_piece_with_nothing_to_learn_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "dialogues-train.jsonl"
    file.write_text(Dialogue.of([*dialogue({"messages": talk({})}).messages], [1]).to_json() + "\n")
    (row,) = rows_of(file, NATIVE, TOKENIZER, 12, packing=False)  # an exchange fills a row
    assert TOKENIZER.decode([one for one in row.ids if one not in TOKENIZER.control_ids.values()]) == "raaaa"


# ---- as the person sees it ---------------------------------------------------------------------------------


def test_the_data_stage_and_sft(tmp_path: Path, chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": SECRET * 3, "weight": 0},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": f"answer {n}"},
            ]
        }
        for n in range(30)
    ]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "train": False},
            ]
        }
    )
    file, out = write(tmp_path / "talks.jsonl", *rows), tmp_path / "data"
    assert cli.main(["data", "--dialogues", str(file), "--validation", "0.3", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "30 answers in 30 of them are not learnt but read as context: they are marked so" in told
    assert "1 left out, for all their answers are marked as not to be learnt" in told
    kept = [*read_records(out / "records" / "dialogues-train.jsonl", Dialogue)]
    assert kept and all(one.unlearnt == (1,) for one in kept)
    for place in (out, file):
        argv = ["sft", "--base", str(chat_dir), "--data", str(place), "--preview", "3", "--packing", "false"]
        assert cli.main(argv) == 0
        told = capsys.readouterr().out
        learnt = [part.partition("]]")[0] for part in told.split("\nrow ", 1)[1].split("[[")[1:]]
        assert SECRET in told and learnt and not any(SECRET in part for part in learnt)
    assert "30 answers in 30 of them are not learnt" in told  # of a single file, said by the stage
    assert cli.main(["data", "preview", str(file), "--count", "1"]) == 0
    told = capsys.readouterr().out
    assert "assistant (marked as not to be learnt): zzzzzzzzz" in told and "assistant: [[answer 0]]" in told


def test_a_file_of_nothing_but_marked_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", *({"messages": talk({})[:2], "weight": 0} for _ in range(3)))
    assert cli.main(["data", "--dialogues", str(file), "--out", str(tmp_path / "data")]) == 1
    assert "all answers in it are marked as not to be learnt" in capsys.readouterr().err


def test_comparisons_keep_their_form() -> None:
    """Marks of turns in front of the answers change nothing: these are not learnt anyway."""
    one = Comparison.of([{"role": "user", "content": "p"}], ["a", "b"], [1, 0])
    assert Comparison.from_json(one.to_json()) == one
