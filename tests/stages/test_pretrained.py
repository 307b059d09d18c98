"""Settings that a pretrained base and the proofs in docs/lab/results.md need: its tokenizer, short rows, few
labels, many checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatwright import checkpoint
from chatwright.config import UserError
from chatwright.data.examples import LabelledText
from chatwright.data.shards import TokenShards
from chatwright.model.config import GPTConfig
from chatwright.stages import ppo, reward, sft
from chatwright.stages import tokenizer as tokenizer_stage
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig
from chatwright.train.planning.program import PlannedStage
from chatwright.train.preference import rankings
from chatwright.train.workspace import Workspace
from support.planted import MINI


def test_the_shards_of_a_base_are_of_its_tokens(
    pretrain_bench: Any, chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = tokenizer_stage.Config(base="pretrain", vocab_size=300)
    report = pretrain_bench.run(tokenizer_stage, config, tmp_path / "tokenizer")
    assert (
        report.facts["fingerprint"] == chat_tokenizer.fingerprint
        and report.facts["vocab_size"] == chat_tokenizer.vocab_size
    )
    ours = TokenShards.open(tmp_path / "tokenizer" / "validation", chat_tokenizer)
    theirs = TokenShards.open(pretrain_bench.inputs["tokenizer"] / "validation", chat_tokenizer)
    assert ours.window(0, 40).tolist() == theirs.window(0, 40).tolist()


def test_short_rows_are_of_that_length(
    pretrain_bench: Any, tmp_path: Path, make_fit: Callable[..., FitConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    real = sft.step
    monkeypatch.setattr(
        sft, "step", lambda model, batch: (lengths.append(batch.ids.shape[1]), real(model, batch))[1]
    )
    rows = {}
    for context in (0, 48, 1000):
        config = sft.Config(context=context, held_out=4, fit=make_fit(steps=1, batch_size=2))
        rows[context] = pretrain_bench.run(sft, config, tmp_path / str(context)).facts["rows"]
        assert set(lengths) == {context if context == 48 else 64}  # never more than the model has
        lengths.clear()
    assert rows[48] >= rows[0] and rows[1000] == rows[0]


def test_short_rows_are_planned_for() -> None:
    shape = GPTConfig.preset("modern-nano", context=64)
    assert PlannedStage("sft", sft.PLAN, shape, sft.Config(context=32)).rows == (1, 32)
    assert PlannedStage("sft", sft.PLAN, shape, sft.Config()).rows == (1, 64)


def test_few_labels_are_drawn_by_the_seed(data_bench: Any, tmp_path: Path) -> None:
    def texts(labels: int, seed: int) -> list[str]:
        workspace = Workspace(tmp_path, seed, data_bench.inputs)
        split = reward.load_split(reward.Config(labels=labels, k=4), workspace)
        assert len(split.held_out) == 20  # all 80 of them: what is held out is not made fewer
        return sorted({answer for one in split.train for answer in one.responses})

    few = texts(24, 1)
    assert len(few) == 24 and texts(24, 1) == few != texts(24, 2)
    assert set(few) < set(texts(0, 1)) and len(texts(0, 1)) == 320
    with pytest.raises(UserError, match="there are 320 rated texts"):
        texts(321, 1)
    made = [LabelledText.of(str(n), n) for n in range(9)]
    assert rankings.drawn(made, 9, 1) == made == rankings.drawn(made, 0, 1)


def test_a_run_of_rounds_keeps_as_many_checkpoints_as_asked(planted_bench: Any, tmp_path: Path) -> None:
    config = replace(MINI, iterations=4, save_steps=1, kl_budget=1e9)
    kept = {}
    for keep in (2, 9):
        best = planted_bench.run(ppo, replace(config, keep=keep), tmp_path / str(keep)).facts["best"]["step"]
        kept[keep] = {one.step for one in checkpoint.checkpoints(tmp_path / str(keep) / "checkpoints")}
        assert best in kept[keep]
    assert kept[9] >= {1, 2, 3, 4} and kept[2] <= kept[9] and len(kept[2]) <= 3
