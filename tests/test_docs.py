"""What the documents say exists: names, links, make targets, verbs, presets and settings.

No stage is imported: the source is read as a syntax tree, so that a broken module cannot hide here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from chatwright import cli, discovery

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
WRITTEN = [
    page for page in PAGES if page.name != "cli.md"
]  # that one is generated; its options stand without their stage
PLACE = re.compile(r"([\w./-]+\.\w+)::([\w.]+)")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = r"^(?:\$ |\w+=\S+ )*"  # what may stand before a command at the beginning of a line of code


def page_text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    """Fenced blocks and inline code, one piece a line."""
    blocks = FENCE.findall(text)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))])


# ---- names -------------------------------------------------------------------------------------------------


def names_in(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions, classes, methods and assigned names (`Class.name` for what is inside a class)."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from names_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield prefix + target.id


@cache
def names_of(path: Path) -> frozenset[str]:
    return frozenset(names_in(tree_of(path).body))


def missing_places(text: str) -> list[str]:
    """Every `file::name` of a text that is not there."""
    missing = []
    for file, name in PLACE.findall(text):
        path = ROOT / file
        if not path.is_file() or name.rstrip(".") not in names_of(path):
            missing.append(f"{file}::{name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_named_exists(page: Path) -> None:
    assert missing_places(page_text(page)) == []


def test_a_wrong_place_is_found() -> None:
    good = "chatwright/train/trainer.py::Trainer.update chatwright/cli.py::FIRST"
    assert missing_places(good) == []
    bad = [
        "chatwright/train/trainer.py::Trainer.upgrade",
        "chatwright/nowhere.py::main",
        "chatwright/cli.py::update",
    ]
    assert missing_places(f"`{bad[0]}`, `{bad[1]}` and {bad[2]}.") == [bad[0], bad[1], f"{bad[2]}."]


def test_where_answers_about_fifty_questions() -> None:
    rows = [
        line
        for line in page_text(ROOT / "docs/where.md").splitlines()
        if line.startswith("|") and "?" in line
    ]
    assert len(rows) >= 50
    assert all(PLACE.search(row) for row in rows)


# ---- links -------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links whose file, or whose heading in it, does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(text if not name else page_text(file))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    assert broken_links(page_text(page), page) == []


def test_a_broken_link_is_found() -> None:
    readme = ROOT / "README.md"
    text = "# A title, here\n[a](LICENSE) [b](docs/nothing.md) [c](#a-title-here) [d](#gone) [e](https://pypi.org)"
    assert broken_links(text, readme) == ["docs/nothing.md", "#gone"]


# ---- make, verbs, recipes, presets, settings ---------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", page_text(ROOT / "Makefile"), re.MULTILINE))


def unknown_targets(text: str) -> set[str]:
    return set(re.findall(COMMAND + r"make ([a-z][a-z-]*)", code_of(text), re.MULTILINE)) - make_targets()


def constant(file: str, name: str) -> ast.expr:
    """The value assigned to a module's name."""
    for node in tree_of(ROOT / file).body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return node.value
    raise AssertionError(f"{file} has no {name}")


def mapping_keys(file: str, name: str) -> list[str]:
    value = constant(file, name)
    assert isinstance(value, ast.Dict)
    return [str(ast.literal_eval(key)) for key in value.keys if key is not None]


def unnamed_verbs(text: str, verbs: Iterable[str]) -> list[str]:
    return [
        verb
        for verb in verbs
        if not re.search(rf"(chatwright {verb}|`{verb}`|^### {verb}$)(?!\w)", text, re.MULTILINE)
    ]


def unknown_verbs(text: str) -> set[str]:
    used = set(re.findall(COMMAND + r"(?:\S*/)?chatwright ([a-z_]+)\b", code_of(text), re.MULTILINE))
    return used - set(cli.verbs())


def unknown_recipes(text: str) -> list[str]:
    names = re.findall(r"recipes/([\w-]+)\.yaml", text) + re.findall(
        r"chatwright run ([a-z][\w-]*)(?![\w./-])", code_of(text)
    )
    return [name for name in names if not (ROOT / "recipes" / f"{name}.yaml").is_file()]


def unknown_presets(text: str) -> list[str]:
    presets = {
        *mapping_keys("chatwright/model/config.py", "PRESETS"),
        *mapping_keys("chatwright/interop/families/__init__.py", "FAMILIES"),
        "smollm2",
    }  # smollm2: a MODEL, not a shape
    words = re.findall(r"`((?:gpt[0-9]|modern|smollm)[\w.-]*)`", text) + re.findall(
        r"preset\(['\"]([^'\"]+)['\"]", text
    )
    return [word for word in words if word not in presets]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_targets_verbs_recipes_and_presets_exist(page: Path) -> None:
    text = page_text(page)
    assert unknown_targets(text) == set()
    assert unknown_verbs(text) == set()
    assert unknown_recipes(text) == []
    assert unknown_presets(text) == []


def test_unknown_targets_verbs_recipes_and_presets_are_found() -> None:
    assert unknown_targets(
        "`make quickstart`, to make sure: `make quickfix MODEL=x`\n```\n$ A=1 make way\n```\n"
    ) == {"quickfix", "way"}
    assert unknown_verbs("chatwright builds; `chatwright run tiny`\n```\nchatwright rum tiny\n```\n") == {
        "rum"
    }
    assert unknown_recipes(
        "recipes/tiny.yaml recipes/huge.yaml `chatwright run tiny` `chatwright run vast`"
    ) == ["huge", "vast"]
    assert unknown_presets("`gpt2-xl` `gpt2-xxl` GPTConfig.preset('modern-tony')") == [
        "gpt2-xxl",
        "modern-tony",
    ]


def test_every_verb_is_documented() -> None:
    text = page_text(ROOT / "README.md") + page_text(ROOT / "docs/reference/cli.md")
    assert unnamed_verbs(text, cli.verbs()) == []
    assert unnamed_verbs(text, [*cli.verbs(), "evaporate"]) == ["evaporate"]


def test_every_stage_and_recipe_is_in_the_readme() -> None:
    text = page_text(ROOT / "README.md")
    for stage in discovery.stages():
        assert f"| {stage} |" in text, stage
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{recipe.name}" in text or f"chatwright run {recipe.stem}" in text, recipe.name


def class_fields(path: Path, name: str) -> dict[str, ast.AnnAssign]:
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id: item
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return {}


def unknown_settings(text: str) -> list[str]:
    """`--STAGE.KEY` and `--STAGE.fit.KEY` whose stage, or whose field in the stage's Config, does not exist.

    Behind `chatwright STAGE`, on the same line or its continuation, `--fit.KEY` (`--optim.`, `--lora.`,
    `--parallel.`) is that stage's; elsewhere, as prose has it, it must be a field of that group.
    """
    stages = stage_files()
    nested = {
        "fit": ("chatwright/train/fit_config.py", "FitConfig"),
        "optim": ("chatwright/optim.py", "OptimConfig"),
        "lora": ("chatwright/model/lora.py", "LoRAConfig"),
        "parallel": ("chatwright/train/parallel/context.py", "ParallelConfig"),
    }
    unknown = []
    for line in re.findall(rf"chatwright (?:{'|'.join(stages)}) (?:.*\\\n)*.*", text):
        stage = line.split()[1]
        text = text.replace(line, re.sub(r"--((?:fit|optim|lora|parallel)\.)", rf"--{stage}.\1", line))
    for option in re.findall(r"--([a-z]+\.[a-z0-9_.]+)", text):
        stage, key, *rest = option.rstrip(".").split(".")
        if stage in nested:
            if key not in class_fields(ROOT / nested[stage][0], nested[stage][1]):
                unknown.append(option)
            continue
        fine = stage in stages and key in {**class_fields(stages[stage], "Config"), **SHARED.get(stage, {})}
        if fine and rest and key in nested:
            file, name = nested[key]
            fine = len(rest) == 1 and rest[0] in class_fields(ROOT / file, name)
        if not fine:
            unknown.append(option)
    return unknown


SHARED = dict.fromkeys(("ppo", "reinforce"), class_fields(ROOT / "chatwright/train/rl/config.py", "RLConfig"))
"""Settings that a stage's Config has from its base class."""


def stage_files() -> dict[str, Path]:
    """Stage -> its file."""
    return {name: ROOT / f"{verb.module.replace('.', '/')}.py" for name, verb in discovery.stages().items()}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_setting_named_exists(page: Path) -> None:
    assert unknown_settings(page_text(page)) == []


def test_an_unknown_setting_is_found() -> None:
    text = (
        "--ppo.iterations 3 --pretrain.fit.seconds=9 --ppo.iteration 3 --pretrain.fit.second 9 "
        "--pope.iterations 3"
    )
    assert unknown_settings(text) == ["ppo.iteration", "pretrain.fit.second", "pope.iterations"]
    verb = (
        "chatwright sft --out x \\\n  --optim.learning_rate 1 --fit.second 9 --lora.rank 8 --lora.size "
        "8\n--fit.seconds 9, --fit.second 9"
    )
    assert unknown_settings(verb) == ["sft.fit.second", "sft.lora.size", "fit.second"]


# ---- the example in Python ---------------------------------------------------------------------------------


def unknown_attributes(code: str) -> list[str]:
    """Attributes of `cw` that are not public, and of `model` that LanguageModel does not have."""
    public = set(ast.literal_eval(constant("chatwright/__init__.py", "__all__")))
    own = {
        name.partition(".")[2]
        for name in names_in(tree_of(ROOT / "chatwright/language_model.py").body)
        if "." in name
    }
    own |= {"model", "tokenizer", "template", "name"}  # set in __init__
    known = {"cw": public, "model": own}
    return [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
        if node.attr not in known[node.value.id]
    ]


def test_the_example_in_python_uses_what_is_public() -> None:
    blocks = PYTHON.findall(page_text(ROOT / "README.md"))
    assert len(blocks) == 1
    assert unknown_attributes(blocks[0]) == []
    assert unknown_attributes("cw.lode('x'); cw.load; model.chatter(1); model.chat") == [
        "cw.lode",
        "model.chatter",
    ]


# ---- reports -----------------------------------------------------------------------------------------------


def test_every_measure_of_the_reports_is_explained() -> None:
    page = page_text(ROOT / "docs/reference/reports.md")
    found = []
    for file in stage_files().values():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Measure", "fitted.measure"):
                name = node.args[1 if ast.unparse(node.func) == "fitted.measure" else 0]
                if isinstance(name, ast.Name):  # a constant of the stage's file
                    name = constant(str(file.relative_to(ROOT)), name.id)
                found.append(name.value if isinstance(name, ast.Constant) else ast.unparse(name))
    assert len(found) > 10
    computed = [name for name in found if name.startswith("f")]  # f-strings: only gzip's and xz's
    assert [name for name in computed if "the same text" not in name] == []
    assert [name for name in found if name not in computed and f"| {name} |" not in page] == []
