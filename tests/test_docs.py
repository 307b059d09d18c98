"""What the documents say exists: names, links, make targets, verbs, presets, settings, and every logged key.

Nothing is imported from the package: the source is read as a syntax tree, so that a broken module cannot hide
here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from chatwright import cli, discovery

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
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
    good = "chatwright/train/trainer.py::Trainer.update chatwright/cli.py::VERBS"
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
        if not re.search(rf"(chatwright {verb}|`{verb}`|^## {verb}$)(?!\w)", text, re.MULTILINE)
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
    text = page_text(ROOT / "README.md") + page_text(ROOT / "docs/cli.md")
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
    `--parallel.`) is that stage's.
    """
    stages = stage_files()
    nested = {
        "fit": ("chatwright/train/loop.py", "FitConfig"),
        "optim": ("chatwright/optim.py", "OptimConfig"),
        "lora": ("chatwright/model/lora.py", "LoRAConfig"),
        "parallel": ("chatwright/train/parallel/context.py", "ParallelConfig"),
    }
    unknown = []
    for line in re.findall(rf"chatwright (?:{'|'.join(stages)}) (?:.*\\\n)*.*", text):
        stage = line.split()[1]
        text = text.replace(line, re.sub(r"--((?:fit|optim|lora|parallel)\.)", rf"--{stage}.\1", line))
    for option in re.findall(r"--([a-z]+\.[a-z0-9_.]+)", text):
        stage, key, *rest = option.split(".")
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
        "8\n--fit.seconds 9"
    )
    assert unknown_settings(verb) == ["sft.fit.second", "sft.lora.size", "fit.seconds"]


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


# ---- logged keys -------------------------------------------------------------------------------------------


Sources = Mapping[str, str]
"""Path in the repository -> source text."""
Scope = ast.FunctionDef | ast.AsyncFunctionDef | None


class LoggedKeys:
    """Every key that can reach metrics.jsonl: what is passed to `....metrics.write(step, HERE)`, followed
    through names, calls, attributes and comprehensions to the dictionaries it is made of.

    It knows the forms that the package uses. Any other form is an AssertionError, so that a new way of
    logging cannot pass unseen: write it in one of the known forms, or teach this class.
    """

    def __init__(self, sources: Sources) -> None:
        self.trees = {file: ast.parse(text) for file, text in sources.items()}
        self.nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        self.scope_of: dict[ast.AST, Scope] = {}
        for tree in self.trees.values():
            self._note_scopes(tree, None)
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.functions = [
            node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        self.busy: set[int] = set()

    def _note_scopes(self, node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            self.scope_of[child] = scope
            inner = child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else scope
            self._note_scopes(child, inner)

    def all(self) -> set[str]:
        """The keys, `step` included. Fails when the log is reached in a way that this class cannot see."""
        used = [node for node in self.nodes if isinstance(node, ast.Attribute) and node.attr == "metrics"]
        known = [
            call.func.value
            for call in self.calls
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in ("write", "write_once", "forget_after", "close")
        ]
        for node in used:
            assert node in known, (
                f"line {node.lineno}: `{ast.unparse(node)}` is used for something else than .write(...)"
            )
        made = [call for call in self.calls if ast.unparse(call.func).endswith("MetricsLog")]
        assert len(made) == 1, "MetricsLog is to be made in Workspace.metrics alone"
        writes = [
            call
            for call in self.calls
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in ("write", "write_once")
            and call.func.value in used
        ]
        assert writes
        keys = {"step"}
        for call in writes:
            assert len(call.args) == 2 and not call.keywords, ast.unparse(call)
            keys |= self.of(call.args[1])
        return keys

    def of(self, value: ast.expr) -> set[str]:
        """The keys of the dictionary that an expression gives."""
        if id(value) in self.busy:
            return set()
        self.busy.add(id(value))
        try:
            return self._of(value)
        finally:
            self.busy.discard(id(value))

    def _of(self, value: ast.expr) -> set[str]:
        match value:
            case ast.Dict():
                pairs = zip(value.keys, value.values, strict=True)
                return set().union(*(self.of(item) if key is None else self.key(key) for key, item in pairs))
            case ast.DictComp(key=ast.Name(name), generators=[ast.comprehension(target=target, iter=source)]):
                return self.looped(name, target, source)
            case ast.BinOp(op=ast.BitOr()):
                return self.of(value.left) | self.of(value.right)
            case ast.Name(name):
                return self.assigned(name, self.scope_of[value])
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="parallel"), attr="forward"),
                args=[ast.Attribute(attr=name)],
            ):
                return self.returned(
                    name
                )  # `ParallelContext.forward` gives what the function that it is given gives
            case ast.Call(func=ast.Attribute(attr="broadcast_from_rank0"), args=[ast.Lambda(body=body)]):
                return self.of(body)
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)):
                return self.returned(name)
            case ast.Attribute(attr="logged"):  # of a Step: the second argument wherever one is made
                steps = [
                    call for call in self.calls if isinstance(call.func, ast.Name) and call.func.id == "Step"
                ]
                given = [item for call in steps for item in call.args[1:2]]
                given += [word.value for call in steps for word in call.keywords if word.arg == "logged"]
                return set().union(*map(self.of, given))
            case ast.Attribute(attr=name):
                return self.stored(lambda target: isinstance(target, ast.Attribute) and target.attr == name)
            case ast.Subscript(slice=ast.Constant(value=place)):
                return self.stored(
                    lambda target: (
                        isinstance(target, ast.Subscript) and ast.unparse(target.slice) == repr(place)
                    ),
                    otherwise=self.entries(place),
                )
        raise AssertionError(
            f"line {value.lineno}: cannot follow `{ast.unparse(value)}` to the keys that it logs"
        )

    def key(self, key: ast.expr) -> set[str]:
        """A key of a dictionary literal: a constant, or an f-string that begins with the unit of
        `throughput`."""
        match key:
            case ast.Constant(value=str(text)):
                return {text}
            case ast.JoinedStr(
                values=[ast.FormattedValue(value=ast.Name("unit")), ast.Constant(value=str(rest))]
            ):
                words = [
                    word.value for call in self.calls for word in call.keywords if word.arg == "throughput"
                ]
                assert words and all(isinstance(word, ast.Tuple) for word in words)
                return {
                    str(ast.literal_eval(word.elts[0])) + rest
                    for word in words
                    if isinstance(word, ast.Tuple)
                }
        raise AssertionError(f"line {key.lineno}: cannot work out the logged key `{ast.unparse(key)}`")

    def looped(self, name: str, target: ast.expr, source: ast.expr) -> set[str]:
        """A key that is the first loop variable over `....items()`, or over `zip(list(names)[1:], ...)`."""
        match target, source:
            case ast.Tuple(elts=[ast.Name(first), *_]), ast.Call(
                func=ast.Name("zip"),
                args=[ast.Subscript(value=ast.Call(func=ast.Name("list"), args=[names])), *_],
            ) if first == name:
                return self.of(names) - {""}
            case ast.Tuple(elts=[ast.Name(first), *_]), ast.Call(func=ast.Attribute(attr="items")) if (
                first == name
            ):
                assert isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute)
                return self.of(source.func.value)
        raise AssertionError(f"line {source.lineno}: cannot follow the keys of `{ast.unparse(source)}`")

    def item(self, target: ast.Subscript, scope: Scope) -> set[str]:
        """The key of `target[key] = ...`."""
        if isinstance(target.slice, ast.Name):
            loops = [
                node for node in self.nodes if isinstance(node, ast.For) and self.scope_of[node] is scope
            ]
            around = [loop for loop in loops if any(node is target for node in ast.walk(loop))]
            return self.looped(target.slice.id, around[-1].target, around[-1].iter)
        return self.key(target.slice)

    def assigned(self, name: str, scope: Scope) -> set[str]:
        """The keys of a local name: everything that its function assigns to it or puts into it."""
        assert scope is not None, f"`{name}` is not a local name"
        inside = [node for node in ast.walk(scope) if self.scope_of.get(node) is scope]
        keys: set[str] = set()
        found = False
        for node in inside:
            match node:
                case ast.AnnAssign(target=ast.Name(left), value=ast.expr() as value) if left == name:
                    keys |= self.of(value)
                    found = True
                case ast.AugAssign(target=ast.Name(left), op=ast.BitOr()) if left == name:
                    keys |= self.of(node.value)
                case ast.Call(func=ast.Attribute(value=ast.Name(left), attr="update" | "setdefault")) if (
                    left == name
                ):
                    raise AssertionError(
                        f"line {node.lineno}: write `{name} |= ...` or `{name}[key] = ...` instead"
                    )
                case ast.Assign():
                    for target in node.targets:
                        match target:
                            case ast.Name(left) if left == name:
                                keys |= self.of(node.value)
                                found = True
                            case ast.Subscript(value=ast.Name(left)) if left == name:
                                keys |= self.item(target, scope)
                            case ast.Tuple() if any(
                                isinstance(one, ast.Name) and one.id == name for one in target.elts
                            ):
                                place = next(
                                    n for n, one in enumerate(target.elts) if ast.unparse(one) == name
                                )
                                assert isinstance(node.value, ast.Call), ast.unparse(node)
                                keys |= self.returned(ast.unparse(node.value.func).rpartition(".")[2], place)
                                found = True
        assert found, f"`{name}` in {scope.name}: cannot see where it comes from"
        return keys

    def returned(self, name: str, place: int | None = None) -> set[str]:
        """The keys of what the functions of this name return (or of one place in the tuple that they
        return)."""
        functions = [function for function in self.functions if function.name == name]
        assert functions, f"no function is called {name}"
        keys: set[str] = set()
        for function in functions:
            returns = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Return) and self.scope_of[node] is function
            ]
            for node in returns:
                value = node.value
                if place is not None:
                    assert isinstance(value, ast.Tuple), f"{name} does not return a tuple"
                    value = value.elts[place]
                assert value is not None
                keys |= self.of(value)
        return keys

    def entries(self, place: object) -> list[ast.expr]:
        """What stands under a constant key in the dictionary literals of the package."""
        literals = [node for node in self.nodes if isinstance(node, ast.Dict)]
        pairs = [pair for node in literals for pair in zip(node.keys, node.values, strict=True)]
        return [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == place]

    def stored(self, fits: Callable[[ast.expr], bool], otherwise: Sequence[ast.expr] = ()) -> set[str]:
        """The keys of what is assigned, anywhere, to an attribute or an entry, or put into it."""
        keys: set[str] = set()
        found = False
        for node in self.nodes:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if fits(target):
                    keys |= self.of(node.value)
                    found = True
                elif isinstance(target, ast.Subscript) and fits(target.value):
                    keys |= self.item(target, self.scope_of[node])
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for left, right in zip(target.elts, node.value.elts, strict=True):
                        keys |= self.of(right) if fits(left) else set()
        assert found or otherwise, "an attribute is logged that nothing is assigned to"
        return keys if found else keys.union(*map(self.of, otherwise))


def package_sources() -> dict[str, str]:
    files = sorted((ROOT / "chatwright").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def documented() -> list[str]:
    """The keys of docs/metrics.md: rows whose first cell is one name in backticks."""
    return re.findall(r"^\| `(\w+)` \|", page_text(ROOT / "docs/metrics.md"), re.MULTILINE)


def test_every_logged_key_is_documented() -> None:
    logged, rows = LoggedKeys(package_sources()).all(), documented()
    assert len(rows) == len(set(rows))
    assert logged - set(rows) == set(), "logged, but without a row in docs/metrics.md"
    assert set(rows) - logged == set(), "a row in docs/metrics.md, but never logged"


PLANTED = {
    "round_facts": (
        "chatwright/train/rl/models.py",
        '        "kl": float(kl.mean()),',
        '        "KEY": 1.0,\n',
    ),
    "ppo_step": (
        "chatwright/stages/ppo.py",
        '        "policy_loss": actor.loss.detach(),',
        '        "KEY": 1.0,\n',
    ),
    "round": (
        "chatwright/train/rl/training.py",
        "        self.workspace.metrics.write(progress.step, logged)",
        '        logged["KEY"] = 1.0\n',
    ),
    "held_out": (
        "chatwright/stages/sft.py",
        '        return {"held_out_loss": total / weight}',
        '        if total > weight:\n            return {"KEY": 1.0, "held_out_loss": 1.0}\n',
    ),
    "loop": ("chatwright/train/loop.py", '                "loss": loss,', '                "KEY": 1.0,\n'),
    "trainer": (
        "chatwright/train/trainer.py",
        '        result["gradient_norm"] = norm',
        '        result["KEY"] = 1.0\n',
    ),
}
"""Where a key might be added: file, line, and the line to put before it."""


def test_a_new_key_is_found_wherever_it_is_added() -> None:
    sources = package_sources()
    for key, (file, line, planted) in PLANTED.items():
        assert sources[file].count(line) == 1, f"{file} has changed: choose another line for {key}"
        sources[file] = sources[file].replace(line, planted.replace("KEY", f"planted_{key}") + line)
    assert LoggedKeys(sources).all() - set(documented()) == {f"planted_{key}" for key in PLANTED}


@pytest.mark.parametrize(
    "code",
    [
        "def log(workspace, found):\n    workspace.metrics.write(1, dict(found))",
        "def log(workspace):\n    file = workspace.metrics\n    file.write(1, {'hidden': 1.0})",
        "def log(path):\n    MetricsLog(path).write(1, {'hidden': 1.0})",
        "def log(workspace, name):\n    workspace.metrics.write(1, {name: 1.0})",
        "def log(workspace):\n    row = {}\n    row.update(hidden=1.0)\n    workspace.metrics.write(1, row)",
    ],
)
def test_a_way_of_logging_that_cannot_be_followed_is_refused(code: str) -> None:
    workspace = "chatwright/train/workspace.py"
    good = "def log(workspace):\n    row = {'seen': 1.0}\n    workspace.metrics.write(1, row)\n"
    sources = {workspace: page_text(ROOT / workspace), "chatwright/train/good.py": good}
    assert LoggedKeys(sources).all() == {"step", "seen"}
    with pytest.raises(AssertionError):
        LoggedKeys({**sources, "chatwright/train/hidden.py": code}).all()


def test_every_measure_of_the_reports_is_explained() -> None:
    page = page_text(ROOT / "docs/metrics.md")
    found = []
    for file in stage_files().values():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Measure":
                name = node.args[0]
                found.append(name.value if isinstance(name, ast.Constant) else ast.unparse(name))
    assert len(found) > 10
    computed = [name for name in found if name.startswith("f")]  # f-strings: only gzip's and xz's
    assert [name for name in computed if "the same text" not in name] == []
    assert [name for name in found if name not in computed and f"| {name} |" not in page] == []
