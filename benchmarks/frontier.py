"""How far must a policy go from where it came from?  Every ppo, reinforce and bestofn stage of a recipe,
measured alike.

    python benchmarks/frontier.py                # recipes/sentiment.yaml with seeds 1, 2 and 3; stopped, it
                                                 # goes on where it was
    python benchmarks/frontier.py --show         # the table and the picture of what is measured already
    python benchmarks/frontier.py --recipe smollm2 --seeds 1 --judge vader-movies --fluency smollm2

Stages run as `chatwright run` runs them: those up to the reward model once, in runs/RECIPE/base with the
recipe's own seed, what learns from it, or chooses by it, once for each seed, in runs/RECIPE/seed-N. A policy
is measured by `measures.Table`: the reward model's score, the gold (VADER's lexicon, which no training saw,
unless the stage names another), KL, variety, on prompts of held-out conversations. Best-of-n is measured by
its own stage on the same prompts; its KL is the analytic one, an upper bound. A stage that fails stays in the
table, with its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measures
import side_by_side

from chatwright import files, pipeline, runtime
from chatwright import recipe as recipes
from chatwright.config import UserError
from chatwright.data import sources
from chatwright.data.splitting import split_of
from chatwright.evaluate.best_of_n import at_kl
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.metrics import say
from chatwright.model.attention import plain_attention
from chatwright.stages import best_of_n
from chatwright.train.rl.gold import SENTIMENT, gold_of
from chatwright.train.rl.models import load_reward
from chatwright.train.workspace import Workspace

METHODS = ("ppo", "reinforce")
BASE = ("data", "tokenizer", "pretrain", "sft", "reward")
"""Verbs of the stages that all seeds share."""
PROMPTS = 96
Rows = dict[str, dict[str, Any]]


def ready(name: str) -> Loaded:
    """A language model by name, on the device and at rest."""
    found = load_parts(name)
    found.model.to(runtime.device()).eval()
    return found


def table_of(config: Any, workspace: Workspace, judges: Mapping[str, Any], third: str) -> measures.Table:
    """Who measures the policies of a stage with these settings."""
    settings = best_of_n.Config(
        policy=config.base,
        reward=config.reward,
        data=config.data,
        prompts=PROMPTS,
        **{
            name: getattr(config, name)
            for name in (
                "max_prompt_tokens",
                "max_new_tokens",
                "temperature",
                "unfinished_score",
                "min_tokens",
                "max_repeats",
                "min_correlation",
            )
        },
    )
    base = ready(str(workspace.resolve(config.base)))
    reward = (
        load_reward(workspace.resolve(config.reward), base, config.min_correlation)
        .to(runtime.device())
        .eval()
    )
    if runtime.device().type == "cpu":
        reward.body.use_attention(plain_attention)
    ask = best_of_n.Scorer(
        reward, gold_of(getattr(config, "gold", "") or SENTIMENT, workspace.resolve, base), settings
    )
    asked = best_of_n.held_out_prompts(settings, workspace, base)
    settings, prompts = asked.config, asked.prompts
    return measures.Table(
        base, ask, prompts, settings, workspace.seed, judges, ready(third) if third else None
    )


def word_judge(source: str, share: float = 0.1) -> tuple[measures.WordBag, float]:
    """A judge that learnt from a labelled source, and its correlation with the ratings of texts held out from
    it."""
    texts = list(sources.labelled_texts(source))
    sides = {
        side: [one for one in texts if split_of(one.id, share) == side] for side in ("train", "validation")
    }
    judge = measures.WordBag(sides["train"])
    return judge, judge.agreement(sides["validation"])


class Bench:
    """One recipe with one seed: its stages, and what is known of their policies."""

    def __init__(
        self, recipe: recipes.Recipe, seed: int, root: Path, rows: Rows, judges: Mapping[str, Any], third: str
    ) -> None:
        self.recipe, self.seed, self.root, self.rows, self.judges, self.third = (
            recipe,
            seed,
            root,
            rows,
            judges,
            third,
        )
        self.inputs: dict[str, Path] = {}
        self.tables: dict[tuple[str, str], tuple[measures.Measured, measures.Table]] = {}

    def run(self, stage: recipes.Stage) -> None:
        """A stage and its row. One that fails leaves its error there, and so do then those that need it."""
        shared = stage.verb in BASE
        directory = self.root / ("base" if shared else f"seed-{self.seed}") / stage.name
        seed = self.recipe.seed if shared else self.seed
        try:
            result = pipeline.run_stage(
                stage, directory, seed=seed, inputs=self.inputs, prompt=self.recipe.prompt
            )
        except UserError as error:
            say(f"[{stage.name}] failed: {error}")
            self.rows[stage.name] = {"failed": str(error)}
            return
        self.inputs[stage.name] = directory
        if stage.verb == "bestofn":
            self.rows[stage.name] = {
                "curve": result["facts"]["curve"],
                "optima": result["facts"].get("optima", {}),
                "seconds": result["seconds"],
            }
        elif stage.verb in METHODS:
            self.rows[stage.name] = self.measured(stage, result, directory)
        else:
            told = {measure["name"]: [measure["before"], measure["after"]] for measure in result["measures"]}
            self.rows[stage.name] = {"measures": told, "seconds": result["seconds"]}

    def measured(self, stage: recipes.Stage, result: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """A policy's row, and before it that of the model it came from; known ones are not measured again."""
        mark = f"{result['fingerprint']} {PROMPTS} {measures.SAMPLES} {sorted(self.judges)} {self.third}"
        file = directory / "measured.json"
        if file.is_file():
            known: dict[str, Any] = files.read_json(file)
            if known["mark"] == mark:
                self.rows.setdefault("before", known["before"])
                return dict(known["row"])
        before, table = self.reference(stage.config)
        say(f"  measuring {stage.name}")
        found = table.measure(ready(str(directory)), before).row()
        row = {
            **found,
            "beta": stage.config.beta,
            "seconds": result["seconds"],
            "kept_round": result["facts"]["best"]["step"],
            "stopped": result["facts"]["stopped"],
            "tax": tax_of(result),
        }
        self.rows["before"] = before.row()
        files.write_json(file, {"mark": mark, "row": row, "before": self.rows["before"]})
        return row

    def reference(self, config: Any) -> tuple[measures.Measured, measures.Table]:
        """The model that a policy came from, measured once, and who measures the policy."""
        key = (config.base, config.reward)
        if key not in self.tables:
            workspace = Workspace(self.root / f"seed-{self.seed}" / "measure", self.seed, self.inputs)
            table = table_of(config, workspace, self.judges, self.third)
            self.tables[key] = (table.measure(table.base), table)
        return self.tables[key]


def tax_of(result: Mapping[str, Any]) -> list[float] | None:
    """Perplexity of general text before and after, where the stage measured it."""
    found = [measure for measure in result["measures"] if measure["name"] == "perplexity of general text"]
    return [found[0]["before"], found[0]["after"]] if found else None


def gathered(samples: Mapping[str, Any], recipe: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Stage -> seed -> row, of one recipe's samples ("RECIPE/seed-N" -> stage -> row)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, rows in samples.items():
        name, _, seed = key.partition("/")
        if name == recipe:
            for stage, row in rows.items():
                found.setdefault(stage, {})[seed] = row
    return found


def at_equal_kl(
    row: Mapping[str, Any], curve: Mapping[str, Mapping[str, float]] | None, measure: str
) -> float | None:
    """By how much a policy is above best-of-n at the same KL; None beyond the largest n."""
    points = [(point["kl"], point[measure]) for point in (curve or {}).values()]
    level = at_kl(points, row["kl"])
    return None if level is None else row[measure] - level


def shown(values: Sequence[float], digits: int = 3) -> str:
    """'0.512 ± 0.034': the mean over seeds and half of its 95 % interval."""
    mean, half = measures.over_seeds(values)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The rows of a recipe as a Markdown table, means over seeds."""
    lines = [
        "| | seeds | KL | score | gold | gold against best-of-n | distinct-2 | tokens | ends |",
        "|" + "---|" * 9,
    ]
    curves = {seed: row["curve"] for seed, row in stages.get("bestofn", {}).items() if "curve" in row}
    for name, by_seed in stages.items():
        good = {seed: row for seed, row in by_seed.items() if "gold" in row}
        for seed, row in by_seed.items():
            if "failed" in row:
                lines.append(f"| {name} | {seed} | failed: {row['failed']} |" + " |" * 6)
        if not good:
            continue
        found = [at_equal_kl(row, curves.get(seed), "gold") for seed, row in good.items()]
        ahead = [value for value in found if value is not None]
        some = f" ({len(ahead)} of {len(found)})" if len(ahead) < len(found) else ""
        cells = [
            shown([row[key] for row in good.values()], digits)
            for key, digits in (("kl", 2), ("score", 2), ("gold", 3))
        ]
        cells.append("0" if name == "before" else shown(ahead) + some if ahead else "beyond")
        cells += [
            f"{statistics.fmean(row[key] for row in good.values()):.{digits}f}"
            for key, digits in (("distinct_2", 3), ("length", 1), ("finished", 3))
        ]
        lines.append(f"| {name} | {len(good)} | {' | '.join(cells)} |")
    for n in next(iter(curves.values()), {}):
        points = [curve[n] for curve in curves.values()]
        cells = [
            f"{points[0]['kl']:.2f}",
            *(shown([one[key] for one in points], d) for key, d in (("score", 2), ("gold", 3))),
        ]
        lines.append(f"| best of {n} | {len(points)} | {' | '.join(cells)} | 0 | | | |")
    tilted = [row["optima"] for row in stages.get("bestofn", {}).values() if "optima" in row]
    for beta in sorted(set.intersection(*map(set, tilted)), key=float, reverse=True) if tilted else []:
        points = [found[beta] for found in tilted]
        cells = [
            shown([one[key] for one in points], digits)
            for key, digits in (("kl", 2), ("score", 2), ("gold", 3))
        ]
        lines.append(f"| optimum at beta {beta} | {len(points)} | {' | '.join(cells)} | | | | |")
    return lines


def extras(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What only some recipes measure: win rates against the model before, fluency, the alignment tax. One
    line a policy and seed."""
    lines = []
    for name, by_seed in stages.items():
        for seed, row in by_seed.items():
            told = [
                f"{key} {row[key]:.3f} ({row[key + '_low']:.3f} to {row[key + '_high']:.3f})"
                for key in row
                if f"{key}_low" in row and (key.startswith("wins") or key == "fluency")
            ]
            if row.get("tax"):
                told.append("perplexity of general text {:.2f} -> {:.2f}".format(*row["tax"]))
            if told:
                lines.append(f"{name}, {seed}: {'; '.join(told)}")
    return lines


def draw(stages: Mapping[str, Mapping[str, Mapping[str, Any]]], file: Path) -> None:
    """Score and gold over KL: a point for each policy and seed, best-of-n as a line with its band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, title) in enumerate(
        (("score", "reward model's score"), ("gold", "gold: VADER sentiment")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for number, row in enumerate(stages.get("bestofn", {}).values()):
            points = list(row.get("curve", {}).values())
            label = "best of n" if number == 0 else None
            axes.plot(
                [p["kl"] for p in points], [p[key] for p in points], color="tab:gray", lw=1.4, label=label
            )
            axes.fill_between(
                [p["kl"] for p in points],
                [p[f"{key}_low"] for p in points],
                [p[f"{key}_high"] for p in points],
                color="tab:gray",
                alpha=0.12,
                lw=0,
            )
            tilted = list(row.get("optima", {}).values())
            axes.plot(
                [p["kl"] for p in tilted],
                [p[key] for p in tilted],
                "--",
                color="black",
                lw=1.0,
                label=label and "optimum",
            )
        for method, colour, marker in (("ppo", "tab:blue", "o"), ("reinforce", "tab:orange", "s")):
            rows = [
                row
                for name, by_seed in stages.items()
                if name.startswith(method)
                for row in by_seed.values()
                if key in row
            ]
            if rows:
                errors = [
                    [max(0.0, sign * (row[key] - row[f"{key}_{side}"])) for row in rows]
                    for sign, side in ((1, "low"), (-1, "high"))
                ]
                axes.errorbar(
                    [row["kl"] for row in rows],
                    [row[key] for row in rows],
                    yerr=errors,
                    fmt=marker,
                    ms=4,
                    lw=0.8,
                    color=colour,
                    label=method,
                )
        axes.set_xlabel("KL to the SFT model, nats per answer")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> int:
    """Run, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="sentiment")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--out", default="runs")
    parser.add_argument(
        "--judge",
        default="",
        help="a labelled source (`chatwright data list`) that a bag of words learns from",
    )
    parser.add_argument(
        "--fluency", default="", help="a model that had no part in it: how likely it finds the answers"
    )
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    file = side_by_side.RESULTS / "frontier.json"
    samples: dict[str, Any] = json.loads(file.read_text())["samples"] if file.exists() else {}
    runtime.set_threads()
    judges = {}
    if options.judge and not options.show:
        judges["words"], agreement = word_judge(options.judge)
        print(
            f"the bag of words agrees with held-out ratings of {options.judge}: correlation {agreement:.3f}"
        )
    if not options.show:
        recipe = recipes.read_recipe(recipes.find_recipe(options.recipe), {})
        root = Path(options.out) / options.recipe
        benches = [
            Bench(
                recipe,
                seed,
                root,
                samples.setdefault(f"{options.recipe}/seed-{seed}", {}),
                judges,
                options.fluency,
            )
            for seed in options.seeds
        ]
        for stage in recipe.stages.values():
            for bench in (
                benches
            ):  # every seed of a stage before the next: what is there when it is stopped can be compared
                bench.run(stage)
                side_by_side.write_results(
                    "frontier", {}, f"python benchmarks/frontier.py --recipe {options.recipe}", [], samples
                )
    stages = gathered(samples, options.recipe)
    print("\n".join([*table(stages), "", *extras(stages)]))
    if "bestofn" in stages:
        draw(stages, Path(__file__).parent.parent / "docs" / f"{options.recipe}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
