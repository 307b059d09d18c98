"""Prompts from conversations, and limits that come from people's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from chatwright.chat import NATIVE
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.model.config import GPTConfig
from chatwright.stages import ppo
from chatwright.tokenizer import Tokenizer
from chatwright.train.planning.program import PlannedStage
from chatwright.train.rl import prompts
from chatwright.train.rl.prompts import Asked, OwnAnswers, ask, exchanges_from
from chatwright.train.rl.run import say_how_long
from chatwright.train.rl.step_program import PLAN
from chatwright.train.workspace import Report

TOKENIZER = Tokenizer.train(["a"], 264)  # a token is a byte


@dataclass(frozen=True)
class Settings:
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    unfinished_score: float = -2.0


def talk(question: int, answer: int) -> Dialogue:
    """A prompt of `question` + 3 tokens, and an answer of `answer` + 1."""
    turns = [{"role": "user", "content": "q" * question}]
    if answer:
        turns.append({"role": "assistant", "content": "a" * answer})
    return Dialogue.of(turns)


def asked(dialogues: list[Dialogue], context: int = 1_000, **settings: Any) -> Asked[Settings]:
    shape = SimpleNamespace(context=context)
    base: Any = SimpleNamespace(model=SimpleNamespace(config=shape), tokenizer=TOKENIZER, template=NATIVE)
    return ask("ppo", Settings(**settings), dialogues, base, most=100)


def test_limits_of_0_come_from_the_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked([talk(5 + n, 20 + n) for n in range(30)])
    assert (found.config.max_prompt_tokens, found.config.max_new_tokens) == (40, 56)  # of 37 and 50
    assert len(found.prompts) == 30 and found.tell(Report()).notes == []
    shown = capsys.readouterr().out
    assert "nothing was cut: 30 prompts, the longest of 37 tokens (max_prompt_tokens 40)" in shown
    assert "answers of at most 56 tokens; 0 % of the conversations' own 30 are longer" in shown


def test_an_explicit_limit_that_cuts_answers_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked([talk(5, 20 if n % 2 else 130) for n in range(50)], max_new_tokens=32)
    line = (
        "max_new_tokens 32 cuts 50 % of the conversations' own answers (longest 131 tokens): each unfinished "
        "answer gets unfinished_score -2; set it to 136, or to 0 for the data's length"
    )
    assert found.config.max_new_tokens == 32 and line in capsys.readouterr().out
    report = found.tell(Report())
    assert report.notes == [line] and report.facts["own answers"]["longest"] == 131
    assert found.own.cause.startswith("max_new_tokens 32 cuts 50 %")


def test_a_few_per_cent_are_no_warning() -> None:
    found = asked([talk(5, 20)] * 97 + [talk(6, 60)] * 3, max_new_tokens=32)
    assert found.warnings == [] and found.own.cause == "" and found.own.cut == pytest.approx(0.03)


def test_one_huge_answer_and_one_huge_prompt_do_not_set_the_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = asked([*[talk(5, 20)] * 20, talk(6, 700), talk(900, 20)], context=4_000)
    assert found.config.max_new_tokens == 256 and found.config.max_prompt_tokens == 256
    assert len(found.prompts) == 21
    shown = capsys.readouterr().out
    assert (
        "of 22 prompts: 1 left out as too long (max_prompt_tokens 256; the longest has 903 tokens:" in shown
    )
    assert "max_new_tokens 256 cuts 5 % of the conversations' own answers (longest 701 tokens)" in shown
    assert "704 would hold all of them" in shown


def test_prompt_and_answer_share_the_context() -> None:
    half = asked([talk(17, 90), talk(18, 90), talk(97, 90)], context=128)
    assert (half.config.max_prompt_tokens, half.config.max_new_tokens) == (64, 64)
    assert len(half.prompts) == 2
    long = asked([talk(97, 50)] * 4, context=128)  # half of it would leave no prompt
    assert (long.config.max_prompt_tokens, long.config.max_new_tokens) == (100, 28)
    assert "context, or memory, allows no more" in long.warnings[0]
    with pytest.raises(UserError) as error:
        asked([talk(97, 90)] * 4, context=128, max_new_tokens=64)
    assert str(error.value) == (
        "ppo: no prompt has at most 64 tokens; the shortest has 100, and the model's context (128 tokens) "
        "less max_new_tokens 64 allows 64: lower max_new_tokens, or shorten the prompts"
    )


def test_limits_that_leave_no_prompt_say_what_to_set() -> None:
    with pytest.raises(
        UserError, match="no prompt has at most 8 tokens; the shortest has 15: raise max_prompt_"
    ):
        asked([talk(12, 3)], max_prompt_tokens=8)
    with pytest.raises(UserError, match="raise max_prompt_tokens to 16 or more, or set it to 0"):
        asked([talk(12, 3)], max_prompt_tokens=8)
    with pytest.raises(UserError, match=r"max_new_tokens 128 leaves no room .* context of 128: set it to 64"):
        asked([talk(12, 3)], context=128, max_new_tokens=128)
    with pytest.raises(UserError, match="no conversation has a user's turn"):
        asked([Dialogue.of([{"role": "assistant", "content": "a"}])])


def test_prompts_without_answers_have_a_limit_too() -> None:
    found = asked([talk(5, 0)] * 3)
    assert found.config.max_new_tokens == prompts.WITHOUT_ANSWERS and found.own.cut == 0.0


def test_each_exchange_is_seen_with_its_own_answer() -> None:
    turns = [{"role": role, "content": f"{role[0]}{n}"} for n in range(5) for role in ("user", "assistant")]
    found = exchanges_from([Dialogue.of(turns)], NATIVE, TOKENIZER, most=10)
    assert found.answers == ["a0", "a1", "a2"] and found.lengths == [5, 13, 21]
    short = exchanges_from([Dialogue.of(turns)] * 3, NATIVE, TOKENIZER, limit=13, most=4)
    assert [len(ids) for ids in short.prompts] == [5, 13, 5, 13] and short.lengths == [5, 13, 21] * 2


def test_the_highest_advice_is_what_there_is_room_for() -> None:
    assert OwnAnswers(8, [100] * 10, most=50).advice == "set it to 50, or to 0 for the data's length"
    assert OwnAnswers(50, [100] * 10, most=50).advice == "the model's context, or memory, allows no more"


def test_the_plan_counts_the_real_lengths() -> None:
    shape = GPTConfig.preset("modern-nano", context=2_048)
    known = ppo.Config(max_prompt_tokens=100, max_new_tokens=60)
    assert PlannedStage("ppo", PLAN, shape, known).rows == (1, 160)
    assert PlannedStage("ppo", PLAN, shape, ppo.Config()).rows == (1, 512)  # not yet known


def test_a_run_that_will_be_long_says_so_after_its_first_iteration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ppo.Config(iterations=40, max_new_tokens=136)
    say_how_long(config, 15.0, 1)
    assert capsys.readouterr().out == ""
    say_how_long(config, 95.0, 1)
    assert capsys.readouterr().out.strip() == (
        "an iteration takes 95 s: the 39 that are left take about 1:01:45; shorter: iterations below 40, "
        "batch_size below 64, max_new_tokens below 136, lora.rank 8"
    )
