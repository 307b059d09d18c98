"""Comparisons whose answers are the same when they are cut: left out, counted, and refused when all are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chatwright.chat import NATIVE
from chatwright.config import UserError
from chatwright.data.cuts import Room
from chatwright.data.examples import Comparison, LabelledText
from chatwright.tokenizer import Tokenizer
from chatwright.train.preference.limits import RowLimits, split_within, within_context
from chatwright.train.preference.rankings import AnswerEncoder, Split, encode_answer
from chatwright.train.preference.rated_texts import Parts, parts_within

TOKENIZER = Tokenizer.train(["a"], 264)  # a token is a byte
ASK = ({"role": "user", "content": "q"},)  # with its frame 4 tokens: <|user|> q <|end|> <|assistant|>
SAME = "x" * 20


def pair(*answers: str, scores: tuple[float, ...] = ()) -> Comparison:
    return Comparison.of(ASK, answers, scores or tuple(float(-n) for n in range(len(answers))))


def within(
    max_tokens: int, *comparisons: Comparison, most: int = 1_000, held_out: Comparison | None = None
) -> tuple[list[Comparison], RowLimits]:
    """The training comparisons that are left, and the limits."""
    config = SimpleNamespace(max_tokens=max_tokens, tie_tolerance=0.5)
    split = Split(list(comparisons), [held_out or pair("yes", "no")], [])
    left, limits = split_within(
        split, AnswerEncoder(NATIVE, TOKENIZER), config, lambda wanted: Room(most, "the base's context")
    )
    return left.train, limits


def test_a_limit_of_0_keeps_everything_whole() -> None:
    first, second = pair(SAME + "a", SAME + "b"), pair("short", "y" * 33)
    left, limits = within(0, first, second)
    assert left == [first, second]
    assert limits.limit == 40 and limits.notes == []  # 4 + 33 + the end token, and up to a multiple of 8
    assert str(limits.cuts).startswith("nothing was cut: 6 answers in comparisons, the longest of 38 tokens")


def test_pairs_that_are_equal_behind_the_cut_are_left_out_and_counted() -> None:
    good, equal = pair("yes", "no"), pair(SAME + "a", SAME + "b")
    left, limits = within(22, equal, good)
    assert left == [good] and limits.dropped == 1 and limits.comparisons == 3
    first, second = limits.notes
    assert first == (
        "1 of 3 comparisons are left out: cut at max_tokens 22, their answers are the same; telling "
        "them apart takes 23"
    )
    assert "2 that lost their end; 2 that cannot be told from another one of their prompt" in second
    assert "the longest has 26 tokens: max_tokens 32 keeps all of them whole" in second
    assert within(limits.needed, equal, good)[0] == [equal, good]
    assert limits.facts["comparisons left out"] == 1 and limits.facts["max_tokens"] == 22


def test_of_a_ranking_only_the_answers_that_are_alike_go() -> None:
    ranking = pair("best", SAME + "a", "good", SAME + "b")
    (left,), limits = within(22, ranking)
    assert left.responses == ("best", "good") and left.scores == (0.0, -2.0)
    assert (
        limits.dropped == 0
        and limits.cuts.causes["that cannot be told from another one of their prompt, left out"] == 2
    )
    lone, limits = within(22, pair(SAME + "a", "one", SAME + "b"), pair("yes", "no"))
    assert len(lone) == 1 and limits.dropped == 1  # one answer alone is no comparison


def test_answers_that_people_rated_alike_may_be_alike() -> None:
    tied = pair(SAME + "a", SAME + "b", "other", scores=(1.0, 1.2, 3.0))
    assert within(22, tied)[0] == [tied]
    same_text = pair(SAME + SAME, SAME + SAME, "other")  # not the cut made them so
    assert within(22, same_text)[0] == [same_text]


def test_one_that_ends_where_the_other_goes_on_can_be_told_apart_only_beyond_its_end() -> None:
    equal = pair(SAME + "a", SAME + "ab")
    assert within(23, equal, pair("yes", "no"))[1].needed == 24
    assert within(24, equal)[0] == [equal]


def test_when_none_is_left_the_error_names_the_setting_and_the_value() -> None:
    equal = pair(SAME + "a", SAME + "b")
    with pytest.raises(UserError) as found:
        within(20, equal, equal)
    assert str(found.value) == (
        "max_tokens 20 makes the answers of all 2 training comparisons the same: they differ only further "
        "on, and 23 tokens tell all of them apart. Set max_tokens to 32, where nothing is cut, or to 0"
    )
    with pytest.raises(UserError, match="all 1 held-out comparisons"):
        within(20, pair("yes", "no"), held_out=equal)
    with pytest.raises(UserError, match="Set max_tokens to 24, the most that the base's context allows"):
        within(20, equal, most=24)
    with pytest.raises(UserError, match="the base's context allows 22: compare shorter answers, or"):
        within(0, equal, most=22)


def test_what_is_measured_is_cut_by_the_model_alone_and_never_refused() -> None:
    equal, good = pair(SAME + "a", SAME + "b"), pair("yes", "no")
    encoder = AnswerEncoder(NATIVE, TOKENIZER)
    assert within_context([equal, good], encoder, 0.5, 64)[0] == [equal, good]
    left, limits = within_context([equal], encoder, 0.5, 22)
    assert left == [] and limits.notes[0] == (
        "1 of 1 comparisons are left out: cut at the model's context 22, their answers are the same; "
        "telling them apart takes 23"
    )
    assert "(the model's context 22; the longest has 26 tokens, the model's context allows 22)" in str(
        limits.cuts
    )


def test_a_prompt_loses_its_beginning_before_an_answer_loses_its_end() -> None:
    asked = ({"role": "user", "content": "q" * 30},)
    left, limits = within(20, Comparison.of(asked, ["a" * 10, "b" * 10], [1.0, 0.0]))
    assert len(left) == 1 and limits.cuts.causes == {"whose prompt lost its beginning": 2}
    row = AnswerEncoder(NATIVE, TOKENIZER).row(asked, "a" * 10, 20)
    assert len(row) == 20 and row[-11:-1] == TOKENIZER.encode("a" * 10)


def test_an_encoder_gives_the_rows_of_encode_answer_and_tokenises_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, texts = AnswerEncoder(NATIVE, TOKENIZER), ["one", "two and more", ""]
    wanted = [encode_answer(ASK, text, NATIVE, TOKENIZER, 12) for text in texts]
    encoder.read(texts)
    encoder.prompt(ASK)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode", again)
    monkeypatch.setattr(Tokenizer, "encode_batch", again)
    encoder.read(texts)
    assert [encoder.row(ASK, text, 12) for text in texts] == wanted
    assert len(encoder.row(ASK, "two and more")) == 4 + 12 + 1  # 0: any number of tokens


def test_good_and_bad_texts_that_are_equal_behind_the_cut_are_left_out() -> None:
    def texts(*rated: tuple[str, float]) -> list[LabelledText]:
        return [LabelledText.of(*one) for one in rated]

    clear = texts(("fine", 1.0), ("poor", -1.0))
    train = [*clear, *texts((SAME + "a", 1.0), (SAME + "b", -1.0), ("y" * 21, 1.0), ("y" * 22, 1.0))]
    parts = Parts(train, clear, clear, clear)
    config = SimpleNamespace(max_tokens=22, threshold=0.0, neutral=0.5, calibration=0.1)
    encoder, room = AnswerEncoder(NATIVE, TOKENIZER), lambda wanted: Room(1_000, "the base's context")
    left, limits = parts_within(parts, [ASK], encoder, config, room)
    assert [one.text for one in left.train] == ["fine", "poor", "y" * 21, "y" * 22]
    assert limits.cuts.causes["that are the same as one of the other class, left out"] == 2
    assert limits.cuts.causes["that lost their end"] == 4
    config.max_tokens = 0
    assert parts_within(parts, [ASK], encoder, config, room)[0] == parts
    config.max_tokens = 22
    with pytest.raises(UserError, match="both kinds are needed; of 6 texts behind the longest prompt"):
        parts_within(Parts(train[2:4], clear, clear, clear), [ASK], encoder, config, room)
