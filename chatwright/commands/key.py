"""Make an API key for a server; the server's file keeps only its hash."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatwright.config import UsageError, UserError, parse
from chatwright.serve.operation.keys import NAME, line_for, new_key, read_keys


@dataclass(frozen=True)
class KeyConfig:
    """Where a new key goes."""

    file: str | None = None
    """File of hashed keys to add the new one to (`chatwright serve --api_keys FILE`); without it the line is
    printed."""


def main(argv: Sequence[str]) -> int:
    """Make a key. The key goes to standard output, its line to the file or to standard error. Raises
    UserError."""
    config, positionals = parse(
        KeyConfig,
        argv,
        prog="chatwright key",
        description="Make an API key for `chatwright serve`. The key is shown once; only its hash is kept.",
        positionals={"name": "Whose key it is: letters, digits and . _ @ -. It appears in the access log."},
    )
    name = str(positionals["name"])
    if not NAME.fullmatch(name):
        raise UsageError(f"the name {name!r} must be 1 to 64 letters, digits or . _ @ -")
    key = new_key()
    line = line_for(name, key)
    if config.file is None:
        print(f"for the server's file of keys:\n{line}\nthe key, which is shown only now:", file=sys.stderr)
    else:
        add_line(Path(config.file).expanduser(), line)
        print(f"added to {config.file}; the key, which is shown only now:", file=sys.stderr)
    sys.stderr.flush()
    print(key)
    return 0


def add_line(path: Path, line: str) -> None:
    """Add a line to a file of keys. A new file is readable by its owner alone. Raises UserError."""
    try:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            read_keys(text, str(path))  # refuses a file that is not a file of keys
            line = line if not text or text.endswith("\n") else f"\n{line}"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(file, "a", encoding="utf-8") as out:
            out.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"--file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--file {path}: not a text file") from None
