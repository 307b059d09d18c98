"""Supervised fine-tuning: the loss mask, the end token, and that a miniature learns to answer and to stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chatwright import checkpoint, files
from chatwright.chat import NATIVE
from chatwright.cli import main
from chatwright.config import UserError
from chatwright.data.chat_rows import Rows, check_end_is_learnt, learnt_tokens, rows_of
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.data.packing import ChatBatch, PackedRow, batch_rows
from chatwright.data.picture import row_picture
from chatwright.data.records import read_records
from chatwright.language_model import load, load_parts
from chatwright.objectives.language import next_token_loss
from chatwright.stages import sft
from chatwright.stages.sft import EXCERPT, excerpt
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig


def dialogues_file(directory: Path, *conversations: list[tuple[str, str]]) -> Path:
    file = directory / "dialogues.jsonl"
    made = [
        Dialogue.of([{"role": role, "content": content} for role, content in turns])
        for turns in conversations
    ]
    file.write_text("".join(dialogue.to_json() + "\n" for dialogue in made), encoding="utf-8")
    return file


def test_answers_and_their_end_tokens_are_learnt_and_nothing_else(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    file = dialogues_file(tmp_path, [("user", "How is the cat?"), ("assistant", "The cat is old.")])
    (row,) = rows_of(file, NATIVE, chat_tokenizer, 64, packing=True)
    learnt = [token for token, flag in zip(row.ids, row.mask, strict=True) if flag]
    rest = [token for token, flag in zip(row.ids, row.mask, strict=True) if not flag]
    assert learnt == [*chat_tokenizer.encode("The cat is old."), chat_tokenizer.control_ids["<|end|>"]]
    controls = chat_tokenizer.control_ids
    question = chat_tokenizer.encode("How is the cat?")
    assert rest == [controls["<|user|>"], *question, controls["<|end|>"], controls["<|assistant|>"]]
    check_end_is_learnt([row], NATIVE, chat_tokenizer)


def test_the_step_is_the_loss_of_the_learnt_tokens(lively_gpt: Callable[..., Any]) -> None:
    """Against logits of every position; filled up to a portion, exactly one portion, more than one, and
    nothing at all."""
    model = lively_gpt()
    draw = torch.Generator().manual_seed(4)
    shape = (30, 20)
    ids = torch.randint(96, shape, generator=draw)
    positions, documents = torch.arange(20).expand(shape), torch.zeros(shape, dtype=torch.long)
    order = torch.randperm(30 * 19, generator=draw)
    for count in (5, sft.PORTION, sft.PORTION + 1, 0):
        learn = torch.zeros(30 * 19, dtype=torch.bool)
        learn[order[:count]] = True
        batch = ChatBatch(
            ids=ids, learn=F.pad(learn.view(30, 19), (1, 0)), documents=documents, positions=positions
        )
        found = []
        for loss in (
            sft.step(model, batch).loss,
            next_token_loss(
                model(ids, positions=positions, documents=documents)[:, :-1], ids[:, 1:], batch.learn[:, 1:]
            ),
        ):
            model.zero_grad()
            loss.backward()
            found.append(
                (loss.detach(), model.head.weight.grad.clone(), model.blocks[0].mlp.down.weight.grad.clone())
            )
        assert (float(found[0][0]) > 1) == (count > 0)
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(
                ours, plain, atol=2e-4, rtol=1e-4
            )  # sums of up to 257 losses, in another order


def test_a_mask_that_leaves_the_end_token_out_is_refused(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    file = dialogues_file(tmp_path, [("user", "How?"), ("assistant", "Well.")])
    rows = rows_of(file, NATIVE, chat_tokenizer, 64, packing=True)
    end = chat_tokenizer.control_ids["<|end|>"]
    broken = [
        replace(row, mask=[flag and token != end for token, flag in zip(row.ids, row.mask, strict=True)])
        for row in rows
    ]
    with pytest.raises(UserError, match="would never stop talking"):
        check_end_is_learnt(broken, NATIVE, chat_tokenizer)
    # the end of a user's turn does not count either
    asked = PackedRow([end, 40], [False, True], [1, 1], [0, 1])
    with pytest.raises(UserError, match="would never stop talking"):
        check_end_is_learnt([asked], NATIVE, chat_tokenizer)


def test_a_stage_whose_answers_are_all_cut_off_is_refused(
    pretrain_bench: Any, tmp_path: Path, make_fit: Callable[..., FitConfig]
) -> None:
    turns = [("user", "Tell me a story"), ("assistant", "And then the cat sees the river. " * 40)]
    for side in ("train", "validation"):
        dialogues_file(tmp_path, turns).rename(tmp_path / f"dialogues-{side}.jsonl")
    bench = pretrain_bench.with_(data=tmp_path)
    with pytest.raises(UserError, match="would never stop talking"):
        bench.run(sft, sft.Config(fit=make_fit(steps=2)), tmp_path / "sft")
    assert not (tmp_path / "sft" / "checkpoints").exists()


def test_conversations_without_an_answer_are_refused(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    file = dialogues_file(tmp_path, [("user", "Hello?")])
    with pytest.raises(UserError, match="no conversation with an assistant's answer"):
        rows_of(file, NATIVE, chat_tokenizer, 64, packing=True)


def test_missing_and_damaged_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl does not exist"):
        list(read_records(tmp_path / "nothing.jsonl", Dialogue))
    (tmp_path / "bad.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl is damaged"):
        list(read_records(tmp_path / "bad.jsonl", Dialogue))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl is damaged"):
        list(read_records(tmp_path / "latin.jsonl", Dialogue))


def test_a_base_without_a_model_is_refused(data_bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        data_bench.run(sft, sft.Config(base=str(tmp_path)), tmp_path / "sft")


@pytest.mark.learns
def test_the_miniature_learns_to_answer(sft_bench: Any, babble: Any, learnt: Any) -> None:
    directory = sft_bench.inputs["sft"]
    result = files.read_json(directory / "result.json")
    extra = checkpoint.Checkpoint(directory / result["model"]).state()["progress"]["extra"]
    before, after = (extra[when]["held_out_loss"] for when in ("before", "after"))
    learnt("held-out loss, as a share", after / before, below=0.5)
    model = load(directory)
    asked = [
        model.chat_request(
            [{"role": "user", "content": f"How is the {thing} number {n}?"}], max_new_tokens=24, seed=n
        )[0]
        for n, thing in enumerate(babble.THINGS * 8)
    ]
    answers = model.engine.generate(asked)
    stopped = sum(answer.finish_reason == "stop" for answer in answers)
    formed = sum(" is " in answer.text for answer in answers)
    learnt("share of answers that stop", stopped / len(answers), above=0.8)
    learnt("share of answers of the form of the examples", formed / len(answers), above=0.83)


def test_the_saved_directory_chats_by_itself(sft_bench: Any, tmp_path: Path) -> None:
    result = files.read_json(sft_bench.inputs["sft"] / "result.json")
    copied = tmp_path / "elsewhere"
    import shutil

    shutil.copytree(sft_bench.inputs["sft"] / result["model"], copied)
    assert sorted(file.name for file in copied.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    talk = [{"role": "user", "content": "Hi"}]
    here, there = (
        load(directory).chat(talk, max_new_tokens=8, seed=1)
        for directory in (sft_bench.inputs["sft"], copied)
    )
    assert here == there != ""


def test_rows_do_not_depend_on_the_portions(sft_bench: Any, sft_parts: Callable[[], Any]) -> None:
    parts = sft_parts()
    file = sft_bench.inputs["data"] / "dialogues-train.jsonl"
    rows = rows_of(file, parts.template, parts.tokenizer, 64, packing=True)
    source = Rows(rows, 64, SampleOrder(len(rows), 3))
    whole = source.take(5, 12)
    parted = [source.take(5 + n, 3) for n in range(0, 12, 3)]
    assert torch.equal(torch.cat([part.ids for part in parted]), whole.ids)
    assert sum(part.weight for part in parted) == whole.weight


def test_packing_changes_the_number_of_rows_and_not_what_is_learnt(
    sft_bench: Any, sft_parts: Callable[[], Any]
) -> None:
    parts = sft_parts()
    file = sft_bench.inputs["data"] / "dialogues-train.jsonl"
    packed, alone = (
        rows_of(file, parts.template, parts.tokenizer, 160, packing=flag) for flag in (True, False)
    )
    assert len(packed) < 0.8 * len(alone)
    assert sum(sum(row.mask) for row in packed) == sum(sum(row.mask) for row in alone)


def test_the_held_out_part_is_limited_by_rows_of_tokens(sft_bench: Any, sft_parts: Callable[[], Any]) -> None:
    parts = sft_parts()
    file = sft_bench.inputs["data"] / "dialogues-train.jsonl"
    few = rows_of(file, parts.template, parts.tokenizer, 160, packing=True, limit=4)
    assert 4 <= len(few) <= 7
    assert len(json.loads(file.read_text().splitlines()[0])["messages"]) == 4


def test_a_model_that_is_not_a_language_model_is_no_base(reward_bench: Any, tmp_path: Path) -> None:
    bench = reward_bench.with_(sft=reward_bench.inputs["reward"])
    with pytest.raises(UserError, match="not a language model"):
        bench.run(sft, sft.Config(base="sft"), tmp_path / "sft")
    assert load_parts(reward_bench.inputs["sft"]).template == NATIVE


# ---- packed = unpacked -------------------------------------------------------------------------------------


def loss_and_gradients(
    model: Any, rows: list[PackedRow], length: int, *, walls: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sum of the losses of some rows, and every parameter's gradient; without walls, conversations in a row
    see each other."""
    batch = batch_rows(rows, length)
    if not walls:
        batch = replace(batch, documents=(batch.documents > 0).long())
    model.zero_grad()
    loss = sft.step(model, batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_packed_conversations_give_the_loss_and_the_gradients_of_unpacked_ones(
    position: str, lively_gpt: Callable[..., Any], chat_tokenizer: Tokenizer, tmp_path: Path, babble: Any
) -> None:
    draw, length = babble(12), 160
    talks = [[(turn["role"], turn["content"]) for turn in draw.messages(1 + n % 2)] for n in range(9)]
    file = dialogues_file(tmp_path, *talks)
    packed, alone = (rows_of(file, NATIVE, chat_tokenizer, length, packing=flag) for flag in (True, False))
    assert len(packed) < len(alone) and max(max(row.documents) for row in packed) > 1
    model = lively_gpt(vocab_size=chat_tokenizer.vocab_size, context=length, position=position)
    loss, gradients = loss_and_gradients(model, packed, length)
    expected, theirs = loss_and_gradients(model, alone, length)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, plain in zip(gradients, theirs, strict=True):
        assert float((ours - plain).norm()) <= 1e-5 * float(plain.norm())
    mixed, others = loss_and_gradients(model, packed, length, walls=False)
    assert abs(float(mixed - expected)) > 1e-3 * float(expected)  # they would have seen each other
    assert any(
        float((ours - plain).norm()) > 1e-3 * float(plain.norm())
        for ours, plain in zip(others, theirs, strict=True)
    )


# ---- preview -----------------------------------------------------------------------------------------------


def test_the_preview_shows_what_is_learnt_and_trains_nothing(
    sft_bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], sft_parts: Callable[[], Any]
) -> None:
    base, data = (str(sft_bench.inputs[name]) for name in ("sft", "data"))
    out = tmp_path / "run" / "sft"
    assert (
        main(["sft", "--base", base, "--data", data, "--out", str(out), "--seed", "3", "--preview", "4"]) == 0
    )
    shown = capsys.readouterr().out
    assert not out.parent.exists() and not list(tmp_path.iterdir())
    parts = sft_parts()
    length = parts.model.config.context
    rows = rows_of(
        sft_bench.inputs["data"] / "dialogues-train.jsonl",
        parts.template,
        parts.tokenizer,
        length,
        packing=True,
    )
    first = [rows[n] for n in SampleOrder(len(rows), 3).take(0, 4)]  # what training with this seed sees first
    for row in first:
        assert row_picture(row, parts.tokenizer, end="<|end|>", colours=False).plain in shown
        assert f"in {max(row.documents)} conversations, {learnt_tokens(row)} learnt" in shown
    tokens, learnt = sum(len(row.ids) for row in rows), sum(learnt_tokens(row) for row in rows)
    assert f"{learnt:,} of {tokens:,} tokens are learnt" in shown and "in [[brackets]]" in shown
    answers = [part.partition("]]")[0] for part in shown.split("[[")[2:]]
    assert len(answers) >= 4 and all(text.startswith("The ") and text.endswith("<|end|>") for text in answers)
    assert shown.count("\nrow ") == 4 and shown.count("--------") == sum(
        max(row.documents) - 1 for row in first
    )
    assert (
        main(["sft", "--base", base, "--data", data, "--out", str(out), "--preview=1", "--packing", "false"])
        == 0
    )
    assert "in 1 conversations" in capsys.readouterr().out


def test_a_preview_of_no_rows_and_of_other_stages_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--preview"], "--preview has no value; it must be a whole number"),
        (["--preview", "0"], "--preview 0 is not a whole number above 0: how many samples to show"),
        (["--preview=all"], "all"),
    ):
        assert main(["sft", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["pretrain", "--preview", "2"]) == 2
    assert "--preview" in capsys.readouterr().err


def test_a_preview_of_rows_that_do_not_learn_to_end_fails_behind_them(
    sft_bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogues_file(tmp_path, [("user", "Go on"), ("assistant", "And then the cat sees the river. " * 40)])
    (tmp_path / "dialogues.jsonl").rename(tmp_path / "dialogues-train.jsonl")
    base = str(sft_bench.inputs["sft"])
    assert (
        main(
            ["sft", "--base", base, "--data", str(tmp_path), "--out", str(tmp_path / "sft"), "--preview", "1"]
        )
        == 1
    )
    shown = capsys.readouterr()
    assert "[[And then the cat" in shown.out and "would never stop talking" in shown.err


def test_a_picture_of_a_row_shows_the_loss_and_not_the_mask(chat_tokenizer: Tokenizer) -> None:
    """The first token of a conversation follows nothing: it is not learnt, whatever the template says."""
    ids = chat_tokenizer.encode("abc")
    assert len(ids) > 1
    row = PackedRow(
        [*ids, *ids], [True] * 2 * len(ids), [1] * len(ids) + [2] * len(ids), [*range(len(ids))] * 2
    )
    first, rest = (chat_tokenizer.decode(part) for part in (ids[:1], ids[1:]))
    assert row_picture(row, chat_tokenizer, end="<|end|>", colours=False).plain == "\n--------\n".join(
        [f"{first}[[{rest}]]"] * 2
    )
    assert learnt_tokens(row) == 2 * (len(ids) - 1) == batch_rows([row], 9).weight
    coloured = row_picture(row, chat_tokenizer, end="<|end|>", colours=True)
    assert "[[" not in coloured.plain and any("green" in str(span.style) for span in coloured.spans)


def test_the_report_shows_the_beginning_of_a_row(
    sft_bench: Any, tmp_path: Path, make_fit: Callable[..., FitConfig], chat_tokenizer: Tokenizer
) -> None:
    report = sft_bench.run(sft, sft.Config(fit=make_fit(steps=1), held_out=2), tmp_path / "sft")
    (table,) = report.tables
    text = " ".join(row[0] for row in table.rows)
    assert "<|user|>" in text and "[[The " in text and "<|end|>]]" in text
    assert 0 < report.facts["tokens learnt"] < report.facts["rows"] * 64
    long = PackedRow(chat_tokenizer.encode("a b " * 900), [False] * 9999, [1] * 9999, list(range(9999)))
    size = len(long.ids)
    long = PackedRow(long.ids, long.mask[:size], long.documents[:size], long.positions[:size])
    assert len(excerpt(long, chat_tokenizer, NATIVE).rows[0][0]) == EXCERPT + 4  # cut, and said so
