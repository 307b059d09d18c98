"""`chatwright compare`: a golden page of two miniature runs, what it calls clear and unfair, and what it
refuses."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatwright import cli, files
from chatwright.config import UserError
from chatwright.reports.compare import align, compare
from chatwright.reports.compare_page import plain, sheets, sketch
from chatwright.reports.runs import read_rows, read_run
from support.made_runs import write_both, write_run, write_stage

GOLDEN = Path(__file__).parent / "golden" / "comparison.md"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """`chatwright compare` in the folder of the runs: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def of(*paths: Path) -> dict[str, Any]:
    runs = [read_run(path) for path in paths]
    return compare(runs, align(runs))


def the(found: dict[str, Any], stage: str) -> dict[str, Any]:
    (one,) = [one for one in found["stages"] if one["stage"] == stage]
    return dict(one)


def test_the_page_of_two_runs(run: Call, tmp_path: Path) -> None:
    write_both(tmp_path)
    code, out, err = run("a", "b", "--out", "page.md")
    assert (code, err) == (0, "")
    page = (tmp_path / "page.md").read_text()
    if os.environ.get("CHATWRIGHT_GOLDEN"):  # to write it anew; then read the difference
        GOLDEN.write_text(page)
    assert page == GOLDEN.read_text()
    pictures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert pictures == [
        "page-ppo-kl.png",
        "page-ppo-score.png",
    ]  # one per metric that both drew; entropy was never a number
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in page for name in pictures
    )
    assert "A = a" in out and "learning_rate" in out and "page.md" in out


def test_json_holds_what_the_page_shows(run: Call, tmp_path: Path) -> None:
    write_both(tmp_path)
    code, out, _ = run("a", "b", "--json")
    found = json.loads(out)
    assert code == 0 and [one["path"] for one in found["runs"]] == ["a", "b"] and found["remarks"] == []
    assert [(one["stage"], one["same"]) for one in found["stages"]] == [
        ("data", True),
        ("sft", True),
        ("ppo", False),
    ]
    ppo = the(found, "ppo")
    assert ppo["settings"] == [{"setting": "optim.learning_rate", "values": [0.5, 2.0]}]
    gold, kl, length = ppo["measures"]
    assert gold["differences"][1] == pytest.approx(0.4) and gold["intervals"] == [None, "do not overlap"]
    assert kl["differences"][1] == pytest.approx(2.0) and kl["intervals"] == [None, None]
    assert length["measure"] == "tokens per answer" and length["differences"][1] == pytest.approx(1.5)
    (paired,) = ppo["paired"]
    assert paired["prompts"] == 12 and paired["difference"] == pytest.approx(0.4) and paired["clear"]
    curves = {one["metric"]: one["values"] for one in ppo["curves"]}
    assert curves["kl"][0] == {
        "first": 0.0,
        "last": 4.0,
        "lowest": 0.0,
        "highest": 4.0,
        "steps": 3.0,
        "shape": sketch([0, 1, 2, 4]),
    }
    cost = {one["cost"]: one for one in ppo["cost"]}
    assert (
        cost["seconds"]["values"] == [120.0, 30.0]
        and cost["seconds"]["ratios"] == [None, 0.25]
        and "energy_kwh" not in cost
    )
    assert ppo["answers"][1] == {
        "prompt": "prompt 1",
        "before": ["old 1", "old 1"],
        "after": ["at 0.5", "at 2.0"],
    }
    assert len(ppo["answers"]) == 10


def test_differences_of_equal_means_are_not_clear(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", rate=0.5, gold=0.2, kl=[0.0, 1.0])
    b = write_run(tmp_path / "b", rate=2.0, gold=0.2, kl=[0.0, 1.0])
    values = files.read_json(b / "ppo" / "per_prompt.json")
    values["values"]["gold"]["after"].reverse()
    files.write_json(b / "ppo" / "per_prompt.json", values)
    ppo = the(of(a, b), "ppo")
    assert ppo["measures"][0]["intervals"] == [None, "overlap"]
    assert not ppo["paired"][0]["clear"] and ppo["paired"][0]["difference"] == pytest.approx(0.0)
    values["prompts"] = [f"other {n}" for n in range(5)] + values["prompts"][5:]
    files.write_json(b / "ppo" / "per_prompt.json", values)
    assert the(of(a, b), "ppo")["paired"] == []  # seven prompts in common are too few


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"seed": 8}, "the seeds differ (A 7, B 8)"),
        ({"data": "d2"}, "the data differ (stages ppo)"),
        ({"version": "2"}, "the versions of chatwright differ (A 1, B 2)"),
        ({"verb": "reinforce"}, "ppo: different kinds of stages (A ppo, B reinforce)"),
        ({"inputs": {"sft": "sft-1", "reward": "other"}}, "ppo: the reward models differ"),
        ({"inputs": {"sft": "other", "reward": "reward-1"}}, "ppo: it starts from different models"),
    ],
)
def test_what_makes_it_unfair_is_one_line(tmp_path: Path, changes: dict[str, Any], remark: str) -> None:
    paths = write_both(tmp_path, **changes)
    if "seed" in changes or "version" in changes:  # of the whole run
        for stage in ("data", "sft"):
            result = files.read_json(paths[1] / stage / "result.json")
            files.write_json(paths[1] / stage / "result.json", result | changes)
    (found,) = of(*paths)["remarks"]
    assert found.startswith(remark)


def test_stages_that_are_missing_or_unfinished_and_older_results(run: Call, tmp_path: Path) -> None:
    a, b = write_both(tmp_path)
    write_stage(a / "eval", "eval", {})
    (b / "ppo" / "result.json").unlink()
    result = files.read_json(b / "sft" / "result.json")
    del result["seed"]
    files.write_json(b / "sft" / "result.json", result)
    code, out, _ = run("a", "b")
    assert code == 0
    assert (
        "! ppo: only in A; not finished in B" in out and "! eval: only in A" in out and "older version" in out
    )
    assert [one["stage"] for one in of(a, b)["stages"]] == ["data", "sft"]


def test_three_runs_and_two_stages_of_different_kinds(tmp_path: Path) -> None:
    a, b = write_both(tmp_path)
    c = write_run(tmp_path / "c", rate=1.0, gold=0.3, kl=[0.0, 1.0])
    ppo = the(of(a, b, c), "ppo")
    assert ppo["settings"][0]["values"] == [0.5, 2.0, 1.0] and len(ppo["paired"]) == 2
    assert ppo["measures"][0]["differences"] == [None, pytest.approx(0.4), pytest.approx(0.1)]
    found = of(a / "ppo", b / "sft")
    assert [one["stage"] for one in found["stages"]] == ["ppo / sft"]
    assert found["remarks"] == ["ppo / sft: different kinds of stages (A ppo, B sft)"]


def test_no_picture_or_page_of_the_user_is_replaced(run: Call, tmp_path: Path) -> None:
    write_both(tmp_path)
    assert run("a", "b", "--out", "page.md")[0] == 0
    picture = sorted(tmp_path.glob("page-*.png"))[0]
    assert run("a", "b", "--out", "page.md")[0] == 0  # those of the earlier comparison are
    picture.rename(name := picture.with_name(picture.name.replace("page", "other")))
    name.write_text("precious")
    before = sorted(one.name for one in tmp_path.iterdir())
    code, _, err = run("a", "b", "--out", "other.md")
    assert code == 1 and f"the picture {name.name} would be replaced, which is none of an earlier" in err
    assert name.read_text() == "precious" and sorted(one.name for one in tmp_path.iterdir()) == before
    (tmp_path / "mine.md").write_text("# Mine\n")
    for arguments in (("a", "b"), ("smollm2", "smollm2")):  # of models, before any of them is loaded
        code, _, err = run(*arguments, "--out", "mine.md")
        assert code == 1 and "--out mine.md exists and is no comparison; name another file" in err


def test_what_is_refused(run: Call, tmp_path: Path) -> None:
    _, b = write_both(tmp_path)
    (tmp_path / "empty").mkdir()
    (b / "sft" / "result.json").unlink()
    for arguments, code, message in (
        (("a",), 2, "compare takes two to 8"),
        (("a",) * 9, 2, "compare takes two to 8"),
        (("a", "nothing"), 1, "nothing is no directory"),
        (("a", "empty"), 1, "empty is no run"),
        (("a/sft", "b/sft"), 1, "b/sft is not finished"),
        (("a", "b/ppo"), 2, "runs go with runs and stages with stages"),
        (("a", "b", "--out", "empty"), 2, "--out empty is a directory"),
        (("a", "b", "--owt", "x"), 2, "did you mean --out"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and message in err and err.count("\n") == 1, err
    for stage in ("data", "ppo"):
        (b / stage / "result.json").unlink()
    assert "none of its stages is finished" in run("a", "b")[2]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("result.json", "[]"),
        ("result.json", '{"verb": "ppo"}'),
        ("result.json", "{"),
        ("metrics.jsonl", '{"step": 0}\nnoise\n{"step": 1}\n'),
        ("metrics.jsonl", '{"step": 0}\n[1]\n{"step": 1}\n'),
        ("metrics.jsonl", '{"step": "x"}\n\n'),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "a: &x {b: *x}\n"),
        (
            "config.yaml",
            "a: &a [1,1]\n"
            + "".join(
                f"k{n}: &m{n} {{{', '.join(f'{i}: *m{n - 1}' for i in 'abcdefgh')}}}\n"
                if n
                else "k0: &m0 {a: 1}\n"
                for n in range(9)
            ),
        ),
        ("pairs.json", '[{"prompt": 1}]'),
        ("per_prompt.json", '{"prompts": ["a"], "values": {"gold": {"before": [1], "after": []}}}'),
    ],
)
def test_damaged_files_are_named(run: Call, tmp_path: Path, file: str, text: str) -> None:
    _, b = write_both(tmp_path)
    (b / "ppo" / file).write_text(text)
    code, out, err = run("a", "b")
    assert (code, out) == (1, "") and f"ppo/{file}" in err and err.count("\n") == 1, err


def test_numbers_of_the_wrong_kind_in_a_result(tmp_path: Path) -> None:
    _, b = write_both(tmp_path)
    good = files.read_json(b / "ppo" / "result.json")
    for key, value in (
        ("seconds", "long"),
        ("seconds", 10**400),
        ("measures", [{"name": "x", "before": "y"}]),
        ("measures", [{"after": 1}]),
        ("measures", [{"name": "x", "interval": [1]}]),
        ("curves", [{"title": "x", "keys": "kl"}]),
        ("cost", {"seconds": None}),
        ("answers", {"measures": {"x": [1]}}),
        ("kl_budget", {"spent": "much"}),
        ("facts", None),
    ):
        files.write_json(b / "ppo" / "result.json", good | {key: value})
        with pytest.raises(UserError, match=r"result.json is damaged"):
            read_run(b)


ODD = [None, True, 0, -1e308, 1e308, 10**400, float("nan"), "", "<b>|\n# x", [], {}, [[]], {"a": 1}, [1, 2]]
"""What a file may hold instead of what it should."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(found for key, one in inside for found in places(one, (*path, key)))]


@pytest.mark.parametrize("file", ["result.json", "pairs.json", "per_prompt.json"])
def test_anything_in_place_of_anything_is_shown_or_refused(tmp_path: Path, file: str) -> None:
    """Any other exception than UserError fails the test, here or when the tables are made."""
    a, b = write_both(tmp_path)
    first, draw, shown = read_run(a), random.Random(file), 0
    good = (b / "ppo" / file).read_text()
    for _ in range(60):
        value = json.loads(good)
        *way, last = draw.choice(places(value))
        target = value
        for key in way:
            target = target[key]
        if isinstance(target, dict) and draw.random() < 0.3:
            del target[last]
        else:
            target[last] = draw.choice(ODD)
        (b / "ppo" / file).write_text(json.dumps(value))
        with contextlib.suppress(UserError):
            runs = [first, read_run(b)]
            found = compare(runs, align(runs))
            shown += sum(len(sheet.rows) for stage in found["stages"] for sheet in sheets(found, stage)) > 0
    assert 0 < shown < 60


ROWS = "".join(
    json.dumps({"step": n, "loss": 1.0 / (n + 1), "null": None, "note": "ü"}, ensure_ascii=False) + "\n"
    for n in range(4)
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, len(ROWS.encode())), at=st.integers(0, len(ROWS.encode())), noise=st.binary(max_size=6)
)
def test_a_metrics_file_that_was_cut_off_or_overwritten(
    tmp_path: Path, cut: int, at: int, noise: bytes
) -> None:
    """A file that merely ends too soon gives its whole rows; anything else is read, or refused in one
    line."""
    whole = ROWS.encode()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(whole[:cut])
    rows = read_rows(file)
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) - whole[:cut].count(
        b"\n"
    ) in (0, 1)
    assert all(set(row) == {"step", "loss"} for row in rows)
    file.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    told = ""
    try:
        rows = read_rows(file)
    except UserError as error:
        rows, told = [], str(error)
    assert all(isinstance(value, float) for row in rows for value in row.values())
    assert not told or ("\n" not in told and "metrics.jsonl, line " in told)


def test_odd_numbers_in_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "a": NaN, "b": 1e999, "c": true, "d": "x", "e": 1' + "0" * 400 + ', "f": 2}\n'
    )
    assert read_rows(file) == [{"step": 1.0, "f": 2.0}]
    file.write_text('{"step": 1' + "0" * 5_000 + "}\n\n")
    with pytest.raises(UserError, match="line 1"):
        read_rows(file)


def test_sketches_and_names() -> None:
    assert sketch([0.0, 1.0, 2.0]) == "▁▅█" and sketch([3.0, 3.0]) == "▄▄"
    assert len(sketch(list(range(1_000)))) == 24 and sketch(list(range(1_000)))[-1] == "█"
    assert plain("../../etc/pass wd") == "_etc_pass_wd"
