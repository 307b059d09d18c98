"""Other people's folders: nothing of theirs is moved or deleted, and a failed start leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chatwright import pipeline
from chatwright.config import UserError
from chatwright.files import whole_directory, whole_file
from chatwright.recipe import RecipeStage
from chatwright.stage_folder import StageFolder
from chatwright.train.workspace import Workspace
from support.small_stages import Make, Run, add_stages, command_line, disk, one_line

RECIPE = "name: two\nstages:\n  one: {use: make}\n  two: {use: use, base: one, data: one}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program, in an empty folder, with the stages of support/small_stages.py."""
    add_stages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


def refused(run: Run, here: Path, *arguments: object) -> str:
    """The line with which a command is refused; the disk stays as it is."""
    before = disk(here)
    code, _, err = run(*arguments)
    assert code in (1, 2)
    assert disk(here) == before
    return one_line(err)


# ---- what is not ours --------------------------------------------------------------------------------------


def test_a_folder_with_a_users_file_is_refused_and_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    told = refused(run, tmp_path, "make", "--out", "mine")
    assert "mine holds notes.txt, which is no work of the stage make; nothing was touched" in told
    assert "--out mine-2" in told


def test_a_clock_of_another_program_makes_no_stage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "clock.json").write_text('{"alarm": "7:00"}')
    assert "mine holds clock.json" in refused(run, tmp_path, "make", "--out", "mine")


def test_the_folder_of_another_stage_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    told = refused(run, tmp_path, "use", "--out", "runs/a/make")
    assert "runs/a/make is the folder of the stage make, not of use" in told and "--out runs/a/use" in told


def test_a_whole_run_is_no_folder_of_a_stage(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    told = refused(run, tmp_path, "make", "--out", "runs/a")
    assert "runs/a is the folder of a whole run (make)" in told and "--out runs/a/make" in told


def test_a_result_that_holds_a_users_file_is_not_moved(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    note = tmp_path / "runs/a/make/notes.txt"
    note.write_text("precious")
    assert run("make", "--out", "runs/a/make")[0] == 0  # the same settings: skipped, and nothing is moved
    told = refused(run, tmp_path, "make", "--out", "runs/a/make", "--size", "2")
    assert "it holds notes.txt, which the stage did not write" in told
    for folder in ("checkpoints", "records", "adapter", "train"):
        (note.parent / folder).mkdir(exist_ok=True)
        inside = note.rename(note.parent / folder / "notes.txt")
        told = refused(run, tmp_path, "make", "--out", "runs/a/make", "--size", "2")
        assert f"{folder}/notes.txt" in told
        inside.rename(note)


def test_a_file_that_only_this_stage_writes_is_known_as_its_own(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    clock = json.loads((tmp_path / "runs/a/make/clock.json").read_text())
    assert clock["files"] == ["made.txt"] and clock["verb"] == "make"
    assert run("make", "--out", "runs/a/make", "--size", "2")[0] == 0
    assert (tmp_path / "runs/a/make.old-1/made.txt").read_text() == "1"


def killed(place: Path, size: int) -> None:
    """A start of `make` that was killed while it loaded: nothing was taken back."""
    folder = StageFolder(place, "make")
    assert (
        pipeline._begin(RecipeStage("make", "make", Make(size)), Workspace(place, 1337), folder) is not None
    )


def test_a_start_that_was_killed_is_taken_back_by_the_next_one(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "runs/a/make"
    assert run("make", "--out", "runs/a/make")[0] == 0
    before = disk(place)
    killed(place, 2)
    assert sorted(one.name for one in place.parent.iterdir()) == ["make", "make.old-1"]
    code, out, _ = run("make", "--out", "runs/a/make")
    assert code == 0 and "finished before" in out
    assert "the last start was ended before it saved anything: runs/a/make.old-1 is back in place" in out
    assert disk(place) == before and sorted(one.name for one in place.parent.iterdir()) == ["make"]
    killed(place, 2)
    killed(place, 2)  # the same once more, and then it runs
    assert run("make", "--out", "runs/a/make", "--size", "2")[0] == 0
    assert (place / "made.txt").read_text() == "2"
    assert (tmp_path / "runs/a/make.old-1/made.txt").read_text() == "1"
    killed(place, 3)
    assert run("make", "--out", "runs/a/make", "--size", "4")[0] == 0  # other settings again
    assert [(tmp_path / f"runs/a/make.old-{n}/made.txt").read_text() for n in (1, 2)] == ["1", "2"]
    killed(place, 5)
    (place / "notes.txt").write_text("precious")
    assert "holds notes.txt" in refused(run, tmp_path, "make", "--out", "runs/a/make", "--size", "6")


PLACES = (
    (".", "is the folder that you are in"),
    ("..", "is a folder around the one you are in"),
    ("/", "is a folder around the one you are in"),
    ("file.txt", "is a file; name a folder of its own"),
    ("file.txt/sft", "file.txt is a file and no folder"),
    ("link", "is a link to elsewhere"),
    ("dangling", "is a link to nowhere"),
    ("runs/a/make/inside", "lies in runs/a/make, the folder of a stage"),
    ("runs/a/make/checkpoints/deep", "lies in runs/a/make, the folder of a stage"),
    ("a" * 300, "File name too long"),
)


@pytest.mark.parametrize(("out", "said"), PLACES, ids=[out[:20] for out, _ in PLACES])
def test_places_that_are_no_folder_of_ones_own(run: Run, tmp_path: Path, out: str, said: str) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    (tmp_path / "file.txt").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    told = refused(run, tmp_path, "make", "--out", out)
    assert said in told and "for example runs/my/make" in told
    told = refused(run, tmp_path, "export", "smollm2", out, "--format", "hf")
    assert said in told and "for example my-model" in told
    assert said in refused(run, tmp_path, "import", "smollm2", out)


def test_a_place_where_nobody_may_write(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "you may not write in ." in refused(run, tmp_path, "make", "--out", "runs/a/make")


def test_a_folder_that_cannot_be_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0

    def fail(self: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    told = refused(run, tmp_path, "make", "--out", "runs/a/make", "--size", "2")
    assert told == "cannot make the folder runs/a/make: Permission denied"


def test_hidden_files_are_in_nobodys_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".gitkeep").touch()
    assert run("make", "--out", "mine", "--fail", "input")[0] == 1
    assert disk(tmp_path) == {"mine": "folder", "mine/.gitkeep": ""}
    assert run("make", "--out", "mine")[0] == 0


# ---- inputs first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--base", "gone"), "its setting base is 'gone', which is neither"),
        (("--data", "gone.jsonl"), "its setting data is 'gone.jsonl', which is neither"),
        (("--base", "owner/name"), "did you mean hf:owner/name?"),
    ],
)
def test_inputs_are_checked_before_a_result_is_moved(
    run: Run, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    assert run("use", "--out", "runs/a/use")[0] == 0
    assert said in refused(run, tmp_path, "use", "--out", "runs/a/use", *options)
    assert said in refused(run, tmp_path, "use", "--out", "runs/new/use", "--data", "file", *options[:2])


def test_an_input_that_fails_later_leaves_the_disk_as_it_was(run: Run, tmp_path: Path) -> None:
    told = refused(run, tmp_path, "make", "--out", "runs/a/make", "--fail", "input")
    assert told == "the input is no good"
    assert run("make", "--out", "runs/a/make")[0] == 0
    before = disk(tmp_path)
    code, out, err = run("make", "--out", "runs/a/make", "--fail", "input")
    assert code == 1 and one_line(err) == "the input is no good"
    assert "[make] could not begin: runs/a/make is as it was" in out
    assert disk(tmp_path) == before


def test_a_mistake_in_the_last_stage_shows_before_the_first_begins(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    told = refused(run, tmp_path, "run", "recipe.yaml", "--two.data", "gone.jsonl")
    assert "two: its setting data is 'gone.jsonl'" in told
    (tmp_path / "runs/two/two").mkdir(parents=True)
    (tmp_path / "runs/two/one").mkdir(parents=True)
    (tmp_path / "runs/two/two/thesis.tex").write_text("precious")
    assert "holds" in refused(run, tmp_path, "run", "recipe.yaml")


# ---- attempts without a result -----------------------------------------------------------------------------


def test_unfinished_attempts_do_not_pile_up(run: Run, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        code, out, _ = run("make", "--out", "runs/a/make", "--size", size, "--fail", "step")
        assert code == 1
    assert "the unfinished attempt is now runs/a/make.old-unfinished" in out
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == ["make", "make.old-unfinished"]
    kept = [path.name for path in (tmp_path / "runs/a/make.old-unfinished/checkpoints").iterdir()]
    assert kept == ["step-000002"]  # the latest but the one that is there
    assert run("make", "--out", "runs/a/make", "--size", "9")[0] == 0
    assert run("make", "--out", "runs/a/make", "--size", "10")[0] == 0
    names = sorted(path.name for path in (tmp_path / "runs/a").iterdir())
    assert names == ["make", "make.old-1", "make.old-unfinished"]  # what was finished is numbered as before


def test_an_unfinished_attempt_is_gone_on_with(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make", "--fail", "stop")[0] == 0
    assert run("make", "--out", "runs/a/make", "--fail", "stop")[0] == 0
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["make"]


def test_the_kept_attempt_with_a_users_file_is_not_replaced(run: Run, tmp_path: Path) -> None:
    for size in (1, 2):
        assert run("make", "--out", "runs/a/make", "--size", size, "--fail", "step")[0] == 1
    (tmp_path / "runs/a/make.old-unfinished/notes.txt").write_text("precious")
    told = refused(run, tmp_path, "make", "--out", "runs/a/make", "--size", "3")
    assert "make.old-unfinished, an unfinished attempt, would be replaced; but it holds notes.txt" in told


def test_an_attempt_that_saved_nothing_is_replaced(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "runs/a/make"
    folder.mkdir(parents=True)
    (folder / "clock.json").write_text('{"fingerprint": "other", "verb": "make", "seconds": 1.0}')
    code, out, _ = run("make", "--out", "runs/a/make")
    assert code == 0 and "in place of an attempt that had saved nothing" in out
    assert [path.name for path in folder.parent.iterdir()] == ["make"]


# ---- a run's folder ----------------------------------------------------------------------------------------


def test_a_run_does_not_write_into_a_folder_of_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "runs/two").mkdir(parents=True)
    (tmp_path / "runs/two/report.md").write_text("precious")
    told = refused(run, tmp_path, "run", "recipe.yaml")
    assert "runs/two is not the folder of a run: it holds report.md; nothing was touched" in told
    assert run("make", "--out", "runs/a/make")[0] == 0
    told = refused(run, tmp_path, "run", "recipe.yaml", "--out", "runs/a", "--name", "make")
    assert "is a stage's folder" in told
    for name in (".", "..", "/tmp/elsewhere", "../a"):
        told = refused(run, tmp_path, "run", "recipe.yaml", "--name", name)
        assert f"--name {name} is no name of a run" in told


def test_a_run_goes_on_in_its_folder_beside_a_users_notes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert run("run", "recipe.yaml", "--until", "one")[0] == 0
    (tmp_path / "runs/two/notes.txt").write_text("mine")
    assert run("run", "recipe.yaml")[0] == 0
    assert (tmp_path / "runs/two/notes.txt").read_text() == "mine"
    assert (tmp_path / "runs/two/two/result.json").is_file()


# ---- other commands that write -----------------------------------------------------------------------------


def test_a_comparison_replaces_comparisons_only(run: Run, tmp_path: Path) -> None:
    for size in (1, 2):
        assert run("make", "--out", f"runs/{size}/make", "--size", size)[0] == 0
    (tmp_path / "notes.md").write_text("precious")
    both = ("runs/1/make", "runs/2/make")
    assert "notes.md exists and is no comparison" in refused(
        run, tmp_path, "compare", *both, "--out", "notes.md"
    )
    told = refused(run, tmp_path, "compare", *both, "--out", "runs/1/make/c.md")
    assert "lies in runs/1/make, the folder of a stage" in told
    for _ in range(2):
        assert run("compare", *both, "--out", "new.md")[0] == 0
    assert (tmp_path / "new.md").read_text().startswith("# Comparison\n")


def test_gguf_goes_into_a_file_of_its_own(run: Run, tmp_path: Path) -> None:
    assert run("make", "--out", "runs/a/make")[0] == 0
    told = refused(run, tmp_path, "export", "smollm2", "runs/a/make/m.gguf", "--format", "gguf")
    assert "lies in runs/a/make, the folder of a stage" in told


def fail_in(place: Path, *, folder: bool) -> None:
    """Write a model half, and fail."""
    with whole_directory(place) if folder else whole_file(place) as aside:
        (aside / "half" if folder else aside).touch()
        raise ValueError("broken")


@pytest.mark.parametrize("folder", [True, False])
def test_what_could_not_be_written_leaves_no_folder(tmp_path: Path, folder: bool) -> None:
    with pytest.raises(ValueError, match="broken"):
        fail_in(tmp_path / "a" / "b" / "model", folder=folder)
    assert disk(tmp_path) == {}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        fail_in(tmp_path / "file" / "model", folder=folder)
