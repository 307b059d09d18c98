"""Files that survive: whole or not at all, damage is found and named, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from chatwright import checkpoint, files, tensor_files
from chatwright.checkpoint import Checkpoint, save_checkpoint
from chatwright.config import UserError
from chatwright.files import whole_directory


def save(target: Path, value: float = 1.0, size: int = 8) -> Checkpoint:
    return save_checkpoint(
        target,
        tensors={"model": {"a": torch.full((size,), value)}, "optimizer": {"0.0.m": torch.zeros(3)}},
        state={"kind": "language", "value": value},
        texts={"tokenizer.json": "{}", "chat_template.jinja": "é"},
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# What is written is read


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "single": torch.tensor([0.1, -0.0, 1e-45, torch.inf]),
        "whole": torch.arange(6).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "bytes": torch.get_rng_state(),
        "scalar": torch.tensor(3.5, requires_grad=True),
        "none": torch.empty(0, 4),
    }
    saved = save_checkpoint(tmp_path / "step-000001", tensors={"model": tensors}, state={})
    read = saved.tensors("model")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_the_state_names_each_file_with_its_checksum(tmp_path: Path) -> None:
    saved = save(tmp_path / "step-000012")
    state = saved.state()
    assert saved.step == 12 and state["value"] == 1.0
    others = [name for name in names(saved.path) if name != "state.json"]
    assert sorted(state["files"]) == sorted([*others, "state.json"])
    assert others == ["chat_template.jinja", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
    own = state["files"].pop("state.json")
    for name, digest in state["files"].items():
        assert files.sha256(saved.path / name) == digest
    text = (saved.path / "state.json").read_text()
    assert text.count(own) == 1
    assert hashlib.sha256(text.replace(own, "0" * 64).encode()).hexdigest() == own
    saved.verify()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path) -> None:
    saved = save(tmp_path / "step-000001")
    modes = {stat.S_IMODE((saved.path / name).stat().st_mode) for name in names(saved.path)}
    assert len(modes) == 1


def test_shared_tensors_are_written_once_and_loaded_for_both(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    model, other = tied(), tied()
    tensors = checkpoint.model_tensors(model)
    assert list(tensors) == ["a.weight"]
    saved = save_checkpoint(tmp_path / "x", tensors={"model": tensors}, state={})
    checkpoint.load_model_tensors(other, saved.tensors("model"), where="x")
    assert torch.equal(other.state_dict()["b.weight"], model.state_dict()["a.weight"])


def test_tensors_that_do_not_fit_are_named() -> None:
    model = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    for tensors, said in (
        ({"weight": good["weight"]}, r"here: missing tensors \['bias'\]"),
        ({**good, "extra": torch.ones(1)}, r"unexpected tensors \['extra'\]"),
        ({**good, "weight": torch.ones(2, 3)}, r"tensor weight has shape \(2, 3\), the model has \(3, 2\)"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.load_model_tensors(model, tensors, where="here")


def test_an_optimiser_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two steps, saved, and a third: the same numbers as three in a row."""

    def make() -> tuple[nn.Linear, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        return model, [
            torch.optim.AdamW([model.weight], lr=0.1),
            torch.optim.SGD([model.bias], lr=0.1, momentum=0.9),
        ]

    def steps(model: nn.Linear, optimisers: list[torch.optim.Optimizer], numbers: range) -> None:
        for number in numbers:
            model.zero_grad()
            model(torch.full((1, 4), float(number))).pow(2).sum().backward()
            for optimiser in optimisers:
                optimiser.step()

    straight, optimisers = make()
    steps(straight, optimisers, range(3))
    model, optimisers = make()
    steps(model, optimisers, range(2))
    tensors = {
        "model": checkpoint.model_tensors(model),
        "optimizer": checkpoint.optimiser_tensors(optimisers),
    }
    saved = save_checkpoint(tmp_path / "x", tensors=tensors, state={})
    again, fresh = make()
    checkpoint.load_model_tensors(again, saved.tensors("model"), where="x")
    checkpoint.load_optimiser_tensors(fresh, saved.tensors("optimizer"))
    steps(again, fresh, range(2, 3))
    assert torch.equal(again.weight, straight.weight) and torch.equal(again.bias, straight.bias)


# Damage is found


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    saved = save(tmp_path / "step-000001")
    file = saved.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"step-000001: {name} is damaged"):
        saved.verify()
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        saved.verify()


def test_any_flipped_bit_of_the_state_is_found(tmp_path: Path) -> None:
    saved = save(tmp_path / "step-000001", 0.1)
    file = saved.path / "state.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"step-000001"):
            saved.verify()
    file.write_bytes(whole.replace(b'"value": 0.1', b'"value": 0.2'))
    with pytest.raises(UserError, match=r"step-000001: state\.json is damaged"):
        saved.verify()
    state = json.loads(whole)
    del state["files"]["state.json"]  # as the first versions wrote it, and how an edit by hand is kept
    file.write_text(json.dumps(state))
    saved.verify()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"null"])
def test_a_state_that_is_none(tmp_path: Path, content: bytes) -> None:
    saved = save(tmp_path / "step-000001")
    (saved.path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json"):
        saved.verify()


@pytest.mark.parametrize("share", [0, 4, 8, 60, 200])
def test_truncated_tensors(tmp_path: Path, share: int) -> None:
    saved = save(tmp_path / "step-000001", size=100)
    file = saved.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:share])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or not a safetensors file"):
        saved.tensors("model")
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        saved.tensors("model")


class Trap:
    """Leaves a mark when somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = tmp_path / "model.safetensors"
    bomb.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError):
        tensor_files.load_tensors(bomb)
    torch.save({"a": Trap(mark)}, bomb)
    with pytest.raises(UserError):
        tensor_files.load_tensors(bomb)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap itself does not work"


# Whole or not at all


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "x"
    with whole_directory(target) as aside:
        (aside / "f").write_text("new")
        assert not target.exists()
    assert names(target) == ["f"] and names(target.parent) == ["x"]
    with whole_directory(target) as aside:
        (aside / "g").write_text("newer")
        assert names(target) == ["f"]
    assert names(target) == ["g"] and names(target.parent) == ["x"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(28, "No space left on device"), KeyboardInterrupt(), UserError("y")]
)
def test_after_an_error_everything_is_as_before(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "x"

    def write() -> None:
        with whole_directory(target) as aside:
            (aside / "half").write_text("half")
            raise error

    for existed in (False, True):
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
            write()
        assert names(tmp_path) == (["x"] if existed else [])
        if not existed:
            target.mkdir()
            (target / "old").write_text("old")
    assert names(target) == ["old"]


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The system refuses to write more than 64 kB: what was there stays, nothing half-written is left."""
    import resource

    target = tmp_path / "step-000001"
    save(target, 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
        with pytest.raises(UserError, match=r"cannot write .*step-000001: .*what was there before is intact"):
            save(target, 2.0, size=100_000)
        with pytest.raises(UserError, match="cannot write"):
            files.write_text(tmp_path / "text", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == ["step-000001"]
    Checkpoint(target).verify()
    assert Checkpoint(target).state()["value"] == 1.0


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    """What it leaves is not taken for a checkpoint, and goes with the next prune."""
    save(tmp_path / "step-000001")
    program = f"""
import os, signal, sys
from pathlib import Path
from chatwright import checkpoint, files
files._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint(Path({str(tmp_path)!r}) / "step-000002", tensors={{}}, state={{}})
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and names(tmp_path)[0].startswith(".step-000002.")
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == [1]
    checkpoint.prune(tmp_path, 5)
    assert names(tmp_path) == ["step-000001"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "x.json"
    files.write_json(file, {"é": [1, None]})
    assert file.read_text(encoding="utf-8") == '{\n "é": [\n  1,\n  null\n ]\n}\n'
    assert files.read_json(file) == {"é": [1, None]}

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        files.write_text(file, "new")
    assert files.read_json(file) == {"é": [1, None]} and names(file.parent) == ["x.json"]


def test_json_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "none.json")
    for content in (b"{", b"\xff", b""):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json cannot be read"):
            files.read_json(tmp_path / "x.json")


# Many checkpoints


def test_only_whole_steps_are_seen_in_their_order(tmp_path: Path) -> None:
    for step in (2, 10, 1_000_000, 1):
        save(tmp_path / f"step-{step:06}")
    (tmp_path / "step-000003.old").mkdir()
    (tmp_path / ".step-000004.77.partial").mkdir()
    (tmp_path / "step-000005").write_text("a file")
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == [1, 2, 10, 1_000_000]
    assert checkpoint.checkpoints(tmp_path / "none") == []


def test_the_newest_valid_one_and_complaints_about_newer_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step-{step:06}")
    assert checkpoint.newest_valid(tmp_path) == (Checkpoint(tmp_path / "step-000004"), [])
    (tmp_path / "step-000004" / "state.json").write_text("{")
    (tmp_path / "step-000003" / "model.safetensors").write_bytes(b"")
    found, complaints = checkpoint.newest_valid(tmp_path)
    assert found is not None and found.step == 2
    assert ["step-000004" in complaints[0], "model.safetensors is damaged" in complaints[1]] == [True, True]
    assert checkpoint.newest_valid(tmp_path / "none") == (None, [])


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [(2, (), [4, 5]), (1, (2,), [2, 5]), (0, (), [5]), (9, (), [1, 2, 3, 4, 5]), (2, (5, 1), [1, 4, 5])],
)
def test_prune(tmp_path: Path, keep: int, protected: tuple[int, ...], left: list[int]) -> None:
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"step-{step:06}").mkdir()
    (tmp_path / ".step-000006.1.partial").mkdir()
    (tmp_path / ".step-000006.1.old").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint.prune(tmp_path, keep, protected=protected)
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == left
    assert names(tmp_path)[0] == "notes"


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    assert json.loads((save(tmp_path / "x").path / "state.json").read_text())["kind"] == "language"


def test_a_writer_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    saved = save(tmp_path / "step-000001")
    saved.path.rename(tmp_path / ".step-000001.123.old")
    save(tmp_path / "step-000002")
    (tmp_path / ".step-000002.123.old").mkdir()  # its new one came into place: the old one is only a leftover
    checkpoint.recover(tmp_path)
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == [1, 2]
    for found in checkpoint.checkpoints(tmp_path):
        found.verify()
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_process_killed_while_it_deletes_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"step-{step:06}")
    program = f"""
import os, signal
from pathlib import Path
from chatwright import checkpoint
from chatwright import tensor_files
from chatwright import files
from chatwright import tensor_files
checkpoint.shutil.rmtree = lambda path, **_: Path(path).exists() and os.kill(os.getpid(), signal.SIGKILL)
checkpoint.prune(Path({str(tmp_path)!r}), 1)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == [2]
    assert any(name.endswith(".gone") for name in names(tmp_path))
    checkpoint.recover(tmp_path)
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000002"]


def test_the_best_is_a_name_in_a_file(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path) is None
    save(tmp_path / "step-000007")
    checkpoint.write_best(tmp_path, 7)
    found = checkpoint.best(tmp_path)
    assert found is not None and found.path == tmp_path / "step-000007"
    for name in ("step-000008", "../step-000007", "", "step-000007/.."):
        (tmp_path / "best").write_text(name)
        with pytest.raises(UserError, match="no checkpoint beside it"):
            checkpoint.best(tmp_path)
