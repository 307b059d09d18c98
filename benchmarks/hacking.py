"""Reward hacking: a proxy that learnt from few labels, optimised far beyond what it is good for.  Gao et al.
2022.

    chatwright run sentiment --out runs/sentiment --name base --until reward     # the model that all starts
    from, and the gold
    python benchmarks/hacking.py                 # recipes/hacking.yaml with seeds 2, 3 and 4; stopped, it
                                                 # goes on where it was
    python benchmarks/hacking.py --show          # the table and the picture of what is measured already

The gold is a reward model that learnt from all labels, the proxy one that learnt from 300 of them. PPO runs
on without a limit, and each of its checkpoints is measured on held-out prompts: proxy and gold over KL. What
early stopping (`gold`, `patience: 5`) would have kept follows from the run's own log, for until it stops such
a run is the same; for the first seed the stage `stopped` does it in earnest, and must keep the same round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measures
import side_by_side
from frontier import ready, table_of

from chatwright import checkpoint, files, pipeline, runtime
from chatwright import recipe as recipes
from chatwright.config import UserError
from chatwright.metrics import read_metrics, say
from chatwright.train.rl import health
from chatwright.train.workspace import Workspace


def run(recipe: recipes.Recipe, root: Path, *, stopped: bool) -> dict[str, Any]:
    """The stages with one seed, and what is to be known of them."""
    inputs: dict[str, Path] = {}
    results: dict[str, Any] = {}
    for stage in recipe.stages.values():
        if stage.name == "stopped" and not stopped:
            continue
        results[stage.name] = pipeline.run_stage(
            stage, root / stage.name, seed=recipe.seed, inputs=inputs, prompt=recipe.prompt
        )
        inputs[stage.name] = root / stage.name
    facts = results["reward"]["facts"]
    limits = health.Limits(recipe.stages["ppo"].config.kl_budget, recipe.stages["stopped"].config.patience)
    rows = read_metrics(root / "ppo" / "metrics.jsonl")
    stop, kept, why = measures.replay(rows, limits)
    found = {
        "proxy": {key: facts[key] for key in ("held_out_correlation", "held_out_accuracy")},
        "rounds": [
            {key: row[key] for key in ("step", "kl", "score", "gold", "gold_error", "length", "distinct_2")}
            for row in rows
        ],
        "stop": stop,
        "kept": kept,
        "why": why,
        "ended": results["ppo"]["facts"]["stopped"],
        "checkpoints": held_out(recipe, root, inputs, kept),
    }
    if "stopped" in results:
        told = results["stopped"]["facts"]
        found["in_earnest"] = {
            "stop": told["iterations"],
            "kept": told["best"]["step"],
            "why": told["stopped"],
        }
    return found


def held_out(recipe: recipes.Recipe, root: Path, inputs: Mapping[str, Path], kept: int) -> dict[str, Any]:
    """Round -> what the policy of that round is like on held-out prompts: every `save_steps` iterations, and
    the kept one. Those known are not measured again."""
    file = root / "ppo" / "measured.json"
    mark = files.read_json(root / "ppo" / "result.json")["fingerprint"]
    known = files.read_json(file) if file.is_file() else {}
    rows: dict[str, Any] = known["rows"] if known.get("mark") == mark else {}
    table = table_of(recipe.stages["ppo"].config, Workspace(root / "measure", recipe.seed, inputs), {}, "")
    if "0" not in rows:
        rows["0"] = table.measure(table.base).row()
    for one in checkpoint.checkpoints(root / "ppo" / "checkpoints"):
        if str(one.step) not in rows and (
            one.step % recipe.stages["ppo"].config.save_steps == 0 or one.step == kept
        ):
            say(f"  measuring round {one.step}")
            rows[str(one.step)] = table.measure(ready(str(one.path))).row()
            files.write_json(file, {"mark": mark, "rows": rows})
    return dict(sorted(rows.items(), key=lambda pair: int(pair[0])))


def verdict(found: Mapping[str, Any]) -> dict[str, float]:
    """The gold, on held-out prompts, of what early stopping kept, of the best checkpoint of the whole run,
    and at its end."""
    points: Mapping[str, Mapping[str, float]] = found["checkpoints"]
    peak = max(points, key=lambda step: points[step]["gold"])
    kept, start, end = points[str(found["kept"])], points["0"], points[max(points, key=int)]
    return {
        "start": start["gold"],
        "peak_round": int(peak),
        "peak": points[peak]["gold"],
        "peak_kl": points[peak]["kl"],
        "kept_round": found["kept"],
        "kept": kept["gold"],
        "kept_kl": kept["kl"],
        "end": end["gold"],
        "end_kl": end["kl"],
        "share": kept["gold"] / points[peak]["gold"],
        "share_of_gain": (kept["gold"] - start["gold"]) / max(points[peak]["gold"] - start["gold"], 1e-9),
        "proxy_at_peak": points[peak]["score"],
        "proxy_at_end": end["score"],
    }


def table(samples: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row a seed, Markdown."""
    lines = [
        "| seed | proxy: correlation | gold before | peak: round, KL, gold | stopped in round | kept: round, "
        "KL, gold | of the peak | of its gain | end: KL, gold | proxy, peak -> end |",
        "|" + "---|" * 10,
    ]
    for seed, found in samples.items():
        if "failed" in found:
            lines.append(f"| {seed} | failed: {found['failed']} |" + " |" * 8)
            continue
        told = verdict(found)
        lines.append(
            f"| {seed} | {found['proxy']['held_out_correlation']:.3f} | {told['start']:.3f} | "
            f"{told['peak_round']:.0f}, {told['peak_kl']:.1f}, {told['peak']:.3f} | {found['stop']} | "
            f"{told['kept_round']:.0f}, {told['kept_kl']:.1f}, {told['kept']:.3f} | {told['share']:.2f} | "
            f"{told['share_of_gain']:.2f} | {told['end_kl']:.1f}, {told['end']:.3f} | "
            f"{told['proxy_at_peak']:.2f} -> {told['proxy_at_end']:.2f} |"
        )
    return lines


def draw(samples: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Proxy and gold on held-out prompts, over rounds and over KL, a column a seed; a dotted line where early
    stopping stays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = {seed: found for seed, found in samples.items() if "checkpoints" in found}
    figure = Figure(figsize=(3.4 * max(len(good), 1), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (seed, found) in enumerate(good.items(), 1):
        points = [{**point, "round": int(step)} for step, point in found["checkpoints"].items()]
        kept = next(point for point in points if point["round"] == found["kept"])
        for line, x in enumerate(("round", "kl")):
            axes = figure.add_subplot(2, len(good), line * len(good) + column)
            curve(axes, points, x, "gold", "tab:green")
            curve(axes.twinx(), points, x, "score", "tab:red")
            axes.axvline(kept[x], color="black", ls=":", lw=1.2)
            axes.set_xlabel("round" if x == "round" else "KL, nats per answer", fontsize=8)
            axes.grid(alpha=0.3)
            if not line:
                axes.set_title(f"{seed}: gold (green, left), proxy (red, right)", fontsize=9)
    figure.savefig(file, dpi=80)


def curve(axes: Any, points: Sequence[Mapping[str, float]], x: str, key: str, colour: str) -> None:
    """Points with their 95 % intervals; joined over rounds, but not over KL, which goes up and down."""
    at, values = [point[x] for point in points], [point[key] for point in points]
    errors = [
        [max(0.0, sign * (point[key] - point[f"{key}_{side}"])) for point in points]
        for sign, side in ((1, "low"), (-1, "high"))
    ]
    axes.errorbar(
        at,
        values,
        yerr=errors,
        color=colour,
        lw=1.2,
        elinewidth=0.6,
        marker="o",
        ms=3,
        ls="-" if x == "round" else "",
    )
    axes.tick_params(labelsize=7)


def main() -> int:
    """Run, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--out", default="runs/hacking")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    file = side_by_side.RESULTS / "hacking.json"
    samples: dict[str, Any] = json.loads(file.read_text())["samples"] if file.exists() else {}
    runtime.set_threads()
    for seed in [] if options.show else options.seeds:
        recipe = replace(recipes.read_recipe(recipes.find_recipe("hacking"), {}), seed=seed)
        try:
            samples[f"seed-{seed}"] = run(
                recipe, Path(options.out) / f"seed-{seed}", stopped=seed == options.seeds[0]
            )
        except UserError as error:
            samples[f"seed-{seed}"] = {"failed": str(error)}
        side_by_side.write_results("hacking", {}, "python benchmarks/hacking.py", [], samples)
    print("\n".join(table(samples)))
    draw(samples, Path(__file__).parent.parent / "docs" / "hacking.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
