"""Best-of-n as a stage on the miniature road (here, because its fixtures are here)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatwright.config import UserError
from chatwright.metrics import read_metrics
from chatwright.reports import report
from chatwright.stages import best_of_n, ppo
from support.planted import LEARNING

SMALL = best_of_n.Config(
    prompts=40, n=8, max_prompt_tokens=40, max_new_tokens=18, min_tokens=1, max_repeats=0.6
)


@pytest.mark.learns
def test_choosing_among_more_answers_pleases_the_reward_model_more(
    planted_bench: Any, tmp_path: Path, learnt: Any
) -> None:
    planted_bench.run(ppo, replace(LEARNING, iterations=5), tmp_path / "ppo")
    bench = planted_bench.with_(ppo=tmp_path / "ppo")
    found = bench.run(best_of_n, replace(SMALL, baseline_policy="ppo"), tmp_path / "bestofn")
    rows = read_metrics(tmp_path / "bestofn" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 8]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores)  # exactly: the estimator is the mean over all subsets of the same answers
    learnt("best of 8 above one answer", scores[-1] - scores[0], above=0.4)
    assert all(row["score_low"] <= row["score"] <= row["score_high"] for row in rows)
    assert found.model is None and found.measures[0].after == found.facts["curve"]["8"]["score"]
    learnt("KL of the other policy", found.facts["baseline_policy"]["kl"], above=0.0)
    assert "ppo: score" in found.notes[0]
    assert found.answers is not None and len(found.answers.pairs) == 10
    first, best = found.answers.values[best_of_n.SCORE]
    assert all(one <= other for one, other in zip(first, best, strict=True))
    assert sum(best) / len(best) == pytest.approx(scores[-1], abs=1e-6) and sum(first) / len(
        first
    ) == pytest.approx(scores[0], abs=1e-6)
    again = bench.run(best_of_n, replace(SMALL, baseline_policy="ppo"), tmp_path / "bestofn")
    assert again.measures == found.measures and read_metrics(tmp_path / "bestofn" / "metrics.jsonl") == rows
    tables = [{"title": one.title, "columns": one.columns, "rows": one.rows} for one in found.tables]
    report.write_stage_report(
        tmp_path / "bestofn",
        "bestofn",
        {
            "seconds": 1.0,
            "measures": [],
            "curves": [],
            "notes": found.notes,
            "facts": {},
            "tables": tables,
        },
    )
    text = (tmp_path / "bestofn" / "report.md").read_text()
    assert "|  | KL, nats | score | gold |" in text and "| best of 8 | 1.20 |" in text


def test_what_is_no_chat_model_or_has_no_prompts_is_refused(planted_bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        planted_bench.run(best_of_n, replace(SMALL, policy="pretrain"), tmp_path / "one")
    with pytest.raises(UserError, match="raise max_prompt_tokens"):
        planted_bench.run(best_of_n, replace(SMALL, max_prompt_tokens=4), tmp_path / "two")
