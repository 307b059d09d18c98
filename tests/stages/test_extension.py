"""A stage and a data source of another package are used like our own, by their entry points alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from chatwright import cli, discovery
from chatwright.config import UsageError, UserError
from chatwright.data import catalogue, sources
from chatwright.files import read_json
from chatwright.metrics import read_metrics
from chatwright.recipe import read_recipe

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the program in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Text and comparisons, in which the better answer is always the same kind of sentence."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    texts = [{"text": f"The old cat number {n} sees the river and the house."} for n in range(60)]
    pairs = [
        {"prompt": f"Where is cat {n}?", "chosen": "It is in the house.", "rejected": "No no no no."}
        for n in range(40)
    ]
    for name, rows in (("text", texts), ("comparisons", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, stages: str) -> Path:
    """A recipe file beside the inputs."""
    file = folder / "others.yaml"
    file.write_text(f"name: others\nseed: 3\nstages:\n{stages}", encoding="utf-8")
    return file


DATA = """\
  data: {{text: {inputs}/text.jsonl, dialogues: couplets, ratings: "", comparisons: {comparisons},
         validation: 0.3}}
"""
DPO = """\
  mini-dpo: {{base: {base}, max_tokens: 48, fit: {{steps: 6, batch_size: 4, precision: fp32, log_every: 2}}}}
"""
ROAD = """\
  tokenizer: {vocab_size: 400}
  pretrain: {preset: modern-nano, fit: {steps: 5, compile: false}}
  sft: {fit: {steps: 5}}
  mini-dpo: {fit: {steps: 300, batch_size: 64}}
"""


def written(inputs: Path, stages: str, **values: object) -> Path:
    """A recipe with a data stage on these inputs and further stages."""
    data = DATA.format(inputs=inputs, comparisons=values.pop("comparisons", f"{inputs}/comparisons.jsonl"))
    return recipe(inputs, data + (stages.format(**values) if values else stages))


# --- the stage ---


def test_the_help_lists_the_stage_and_tells_its_settings(extension: Path, run: Cli) -> None:
    summary = "Mini-DPO: prefer the better of two answers, without a reward model"
    assert f"\n  mini_dpo   {summary}\n" in run("--help")[1]
    for spelled in ("mini_dpo", "mini-dpo"):
        code, out, err = run(spelled, "--help")
        assert (code, err) == (0, "") and summary in out
        assert "--beta BETA" in out and "How strongly the policy is held to the reference." in out


def test_the_help_of_run_lists_stages_and_of_a_recipe_their_settings(
    extension: Path, run: Cli, inputs: Path
) -> None:
    out = " ".join(run("run", "--help")[1].split())
    listed = out.partition("Stages that a recipe can have: ")[2].partition(".")[0]
    assert listed.split(", ") == list(discovery.stages()) and "mini_dpo" in listed
    code, out, _ = run("run", written(inputs, ROAD), "--help")
    assert code == 0 and "--mini-dpo.beta BETA" in out and "--pretrain.fit.seconds SECONDS" in out
    assert "How strongly the policy is held to the reference." in " ".join(out.split())


def test_the_stage_runs_in_a_recipe_with_the_other_packages_data(
    extension: Path, run: Cli, inputs: Path, chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATWRIGHT_CACHE", str(tmp_path / "cache"))
    file = written(inputs, DPO, base=chat_dir)
    code, out, err = run("run", file, "--out", tmp_path / "runs", "--mini-dpo.fit.save_every", 9e9)
    assert (code, err) == (0, ""), err
    root = tmp_path / "runs" / "others"
    assert "licence of couplets: CC0" in (root / "data" / "report.md").read_text()
    dialogues = (root / "data" / "records" / "dialogues-train.jsonl").read_text().splitlines()
    held_out = (root / "data" / "records" / "dialogues-validation.jsonl").read_text().splitlines()
    assert len(dialogues) + len(held_out) == 60

    result = read_json(root / "mini-dpo" / "result.json")
    before, after = (result["measures"][0][side] for side in ("before", "after"))
    assert before == pytest.approx(0.6931, abs=1e-3) and after < before  # it began as its own reference
    logged = {key for row in read_metrics(root / "mini-dpo" / "metrics.jsonl") for key in row}
    assert {"loss", "accuracy", "held_out_loss", "held_out_accuracy"} <= logged
    report = (root / "mini-dpo" / "report.md").read_text()
    paper, _, rest = report.partition("## Before and after")
    assert "Rafailov et al. 2023, appendix B" in paper and "As in the paper: beta." in paper
    pairs, _, budget = rest.partition("## KL budget")
    assert "held-out prompts, not chosen" in pairs and "Where is the" in pairs
    told = budget.strip().splitlines()[0]
    assert told.startswith("spent ") and "no budget was set" in told and str(chat_dir) in told
    assert "mini-dpo" in out and "loss on held-out pairs" in out

    again = run("run", file, "--out", tmp_path / "runs", "--mini-dpo.fit.save_every", 9e9)
    assert again[0] == 0 and "[mini-dpo] finished before" in again[1]


def test_plan_and_doctor_know_the_stage(extension: Path, run: Cli, inputs: Path) -> None:
    file = written(inputs, ROAD)
    code, out, err = run("plan", file, "--time", "false")
    assert (code, err) == (0, "")
    head = next(line for line in out.splitlines() if "pretrain" in line)
    assert head.split(" ")[-2:] and {"pretrain", "sft", "mini-dpo"} <= {*head.replace("┃", " ").split()}
    code, out, err = run("doctor", file)
    assert (code, err) == (0, ""), out
    assert "for mini-dpo, the largest stage" in " ".join(out.split())


def test_doctor_misses_the_records_that_the_stage_reads(extension: Path, run: Cli, inputs: Path) -> None:
    file = written(inputs, DPO, base="smollm2", comparisons='""')
    code, out, _ = run("doctor", file)
    assert code == 1 and "`comparisons` is empty, but mini-dpo learns from them" in " ".join(out.split())


def test_a_plan_that_does_not_fit_is_refused_with_the_stages_name(
    extension: Path, run: Cli, inputs: Path
) -> None:
    code, out, _ = run("plan", written(inputs, ROAD), "--time", "false", "--memory_gb", 0.3)
    assert code == 1 and "does not fit: mini-dpo with micro-batches of" in " ".join(out.split())


def test_documents_of_the_command_line_are_made_for_it(
    extension: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    script = load_script("write_cli_docs")
    lines = script.section("mini_dpo")
    assert (
        lines[0].endswith("# mini_dpo")
        and "The chat model to start from; it stays the reference." in lines[3]
    )


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    file = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_of_the_stage_are_checked_like_our_own(extension: Path, run: Cli, inputs: Path) -> None:
    file = written(inputs, DPO, base="sft")
    assert read_recipe(file, {}).stages["mini-dpo"].config.max_tokens == 48
    code, _, err = run("run", file, "--mini-dpo.betta", "0.2")
    assert code == 2 and "did you mean --mini-dpo.beta?" in err
    code, _, err = run("mini-dpa")
    assert code == 2 and "did you mean 'mini_dpo'?" in err


# --- packages that are broken, and names that are taken ---


@pytest.fixture
def broken(extension: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a package whose entry points lead to modules with this text."""

    def make(stages: dict[str, str], data: dict[str, str]) -> None:
        folder = tmp_path / "broken"
        info = folder / "broken_things-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-things\nVersion: 1.0\n")
        lines = []
        for group, modules in ((discovery.STAGES, stages), (discovery.SOURCES, data)):
            lines.append(f"[{group}]")
            for name, text in modules.items():
                module = f"broken_{name.replace('-', '_')}_{group[-6:]}"
                (folder / f"{module}.py").write_text(text)
                lines.append(f"{name} = {module}" + (":SOURCE" if group == discovery.SOURCES else ""))
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(folder))
        discovery.stages.cache_clear()

    return make


def test_a_stage_that_cannot_be_imported_is_named_and_harms_nothing_else(
    broken: Callable[..., None], run: Cli
) -> None:
    broken({"torn": '"""Torn: not Python."""\nimport no_such_module', "bare": '"""Bare."""'}, {})
    assert "\n  torn       Torn: not Python\n" in run("--help")[1]
    code, _, err = run("torn")
    assert code == 1
    assert "the stage torn of package broken-things cannot be loaded: ModuleNotFoundError" in err
    code, _, err = run("bare")
    assert code == 2 and "has no STAGE = Stage(...): it is not a stage" in err
    assert run("mini_dpo", "--help")[0] == 0


def test_names_of_ours_cannot_be_taken(broken: Callable[..., None], run: Cli) -> None:
    text = "raise RuntimeError('never imported')"
    broken({"sft": text, "serve": text}, {"boolq": text})
    assert discovery.stages()["sft"].module == "chatwright.stages.sft"
    assert "serve" not in discovery.stages()
    boolq = catalogue.find("boolq")
    assert boolq is not None and boolq.archive is not None and catalogue.names().count("boolq") == 1


def test_sources_are_loaded_when_they_are_named_and_broken_ones_are_told(
    broken: Callable[..., None], run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken({}, {"torn": "raise RuntimeError('torn')", "other": "SOURCE = 3"})
    assert {"couplets", "torn", "other"} <= {*catalogue.names()}
    found = list(sources.dialogues("couplets"))  # the broken ones stay asleep
    assert len(found) == 60 and len(list(sources.documents("couplets"))) == 60
    with pytest.raises(UserError, match=r"data source torn of package broken-things cannot be loaded.*torn"):
        sources.dialogues("torn")
    with pytest.raises(UserError, match=r"other of package broken-things: .* is no Source of that name"):
        sources.dialogues("other")
    with pytest.raises(UserError, match="couplets holds text and dialogue records, not labelled"):
        sources.labelled_texts("couplets")
    with pytest.raises(UserError, match="did you mean 'couplets'"):
        sources.dialogues("coupletts")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("data", "list")
    shown = " ".join(out.split())
    assert code == 0 and "CC0" in shown and "boolq" in shown and "torn" in shown and "package" in shown


def test_a_stage_without_a_plan_is_refused_when_it_is_imported() -> None:
    from chatwright.stages import sft
    from chatwright.train.stage import Stage

    with pytest.raises(UsageError, match=r"chatwright\.stages\.sft: a stage with an optimiser needs a plan"):
        Stage(config=sft.Config, run=sft.run, plan=None)


def test_the_extension_has_no_other_tie_to_the_program() -> None:
    """Three files and its metadata: nothing of ours mentions them."""
    root = Path(__file__).parents[2]
    files = [*(root / "chatwright").rglob("*.py"), *(root / "recipes").glob("*.yaml")]
    assert not [file for file in files if "mini_dpo" in file.read_text() or "couplets" in file.read_text()]
