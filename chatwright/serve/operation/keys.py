"""API keys, which give access to a server.

A key is "cw-" and 256 random bits. The server's file holds only hashes, one key per line: `NAME sha256:HEX`;
`#` begins a comment. 256 random bits cannot be guessed from their hash, so it needs no salt and no slow hash
function. For containers, the environment variable CHATWRIGHT_API_KEYS may hold plain keys, comma separated.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chatwright.config import UserError

logger = logging.getLogger(__name__)

VARIABLE = "CHATWRIGHT_API_KEYS"
SHORTEST = 16
"""Fewest characters of a key in the environment, which somebody may have made up."""
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Key:
    """A key as the server knows it."""

    name: str
    """For the access log."""
    digest: bytes
    """SHA-256 of the key."""


def new_key() -> str:
    """A fresh key."""
    return f"cw-{secrets.token_urlsafe(32)}"


def digest(key: str) -> bytes:
    """The SHA-256 by which the server knows a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def line_for(name: str, key: str) -> str:
    """The line of the keys' file for a key."""
    return f"{name} sha256:{digest(key).hex()}"


def read_keys(text: str, where: str) -> list[Key]:
    """The keys of a file's text. Raises UserError naming the first invalid line; for a plain key, the message
    has the line to write instead."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, secret = (f"key-{number}", words[0]) if len(words) == 1 else (words[0], words[1])
        found = HASH.fullmatch(secret)
        if len(words) > 2 or not NAME.fullmatch(name) or (len(words) == 1 and found):
            raise UserError(
                f"{where}, line {number}: expected `NAME sha256:HEX`; `chatwright key NAME` makes such a line"
            )
        if found is None:
            if secret.startswith("sha256:"):
                raise UserError(
                    f"{where}, line {number}: a SHA-256 has 64 hexadecimal digits; this line was cut or "
                    "changed"
                )
            raise UserError(
                f"{where}, line {number}: keys must not stand here in clear; write instead: "
                f"{line_for(name, secret)}"
            )
        keys.append(Key(name, bytes.fromhex(found[1])))
    return keys


class KeyRing:
    """The valid keys of a server: those of a file, read again whenever it changes, and those of the
    environment.

    Raises UserError when the file is unreadable or invalid, or when there are no keys at all. If the file
    becomes unreadable or invalid later, the keys stay as they were and the log says so. If it becomes empty,
    its keys are no longer valid.
    """

    def __init__(self, path: Path | None, clear: Iterable[str] = ()) -> None:
        self._path = path
        self._fixed = [Key(f"environment-{digest(key).hex()[:8]}", digest(key)) for key in clear]
        self._seen: object = self._stamp()
        self._keys = self._read()
        if not self._keys and not self._fixed:
            raise UserError(
                f"--api_keys {path}: there are no keys in it; `chatwright key NAME --file {path}` adds one"
            )

    def refresh(self, *, force: bool = False) -> None:
        """Read the file again if it has changed."""
        stamp = self._stamp()
        if stamp == self._seen and not force:
            return
        self._seen = stamp  # before reading: a damaged file is reported once, not at every request
        try:
            self._keys = self._read()
        except UserError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.warning("read the keys again: %d in %s", len(self._keys), self._path)

    def find(self, presented: str) -> Key | None:
        """The key that was presented, or None. Takes equally long for any wrong key: no timing attack."""
        self.refresh()
        asked, found = digest(presented), None
        for key in (*self._fixed, *self._keys):
            if hmac.compare_digest(key.digest, asked):
                found = key
        return found

    def holds(self, key: Key) -> bool:
        """Whether a key that was found earlier is still valid."""
        self.refresh()
        return any(hmac.compare_digest(key.digest, other.digest) for other in (*self._fixed, *self._keys))

    def _stamp(self) -> object:
        if self._path is None:
            return None
        try:
            now = self._path.stat()
        except OSError as error:
            return error.errno
        return now.st_mtime_ns, now.st_size, now.st_ino

    def _read(self) -> list[Key]:
        if self._path is None:
            return []
        try:
            if os.name == "posix" and self._path.stat().st_mode & 0o002:
                raise UserError(
                    f"{self._path}: everybody on this machine could add a key; run: chmod o-w {self._path}"
                )
            return read_keys(self._path.read_text(encoding="utf-8"), str(self._path))
        except OSError as error:
            raise UserError(f"--api_keys {self._path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--api_keys {self._path}: not a text file") from None


def open_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> KeyRing | None:
    """The keys of `file` and the environment; None when neither is given. Raises UserError."""
    given = environment.get(VARIABLE)
    clear = [key.strip() for key in given.split(",") if key.strip()] if given is not None else []
    if given is not None and not clear:
        raise UserError(f"{VARIABLE} is set but empty: unset it, or put keys into it")
    if any(len(key) < SHORTEST or not key.isascii() or not key.isprintable() for key in clear):
        raise UserError(
            f"{VARIABLE}: a key needs {SHORTEST} printable ASCII characters or more; `chatwright key NAME` "
            "makes one"
        )
    if file is None and not clear:
        return None
    return KeyRing(None if file is None else Path(file).expanduser(), clear)
