"""`chatwright serve MODEL --engine vllm`: vLLM replaces this process and serves a model in transformers'
format.

vLLM is a separate program and is not imported. A chatwright model (or a .gguf file) is first exported into
the cache folder under its fingerprint, so that a second start finds it there. A directory in transformers'
format and `hf:owner/name` are passed on as they are. The options were checked against a copy of vLLM's
sources from about release 0.30 (docs/guide/serving-many.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chatwright.config import UsageError, UserError
from chatwright.serve.operation.guard import is_loopback

if TYPE_CHECKING:
    from chatwright.serve.config import ServeConfig

CARRIED = frozenset({"host", "port", "name", "dtype", "insecure", "defaults", "engine", "engine_args"})
"""Settings of `serve` that take effect here or in vLLM. A change of any other one is refused, since it would
have no effect."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
KEY = "VLLM_API_KEY"
"""The environment variable from which vLLM reads its key."""
FAMILIES = frozenset(
    {
        *("gpt2", "gpt_neox", "llama", "arcee", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "olmo3"),
        *("phi3", "granite", "gemma2", "gemma3_text"),
    }
)
"""The families of exports that vLLM supports; it does not support GPT-1's post-norm decoder."""


@dataclasses.dataclass(frozen=True)
class Handed:
    """The model that vLLM is to serve."""

    model: str
    """A directory in transformers' format, or owner/name of the Hugging Face hub."""
    dtype: str | None = None
    """vLLM's name for the precision; None leaves it to vLLM."""
    context: int | None = None
    """The longest conversation, in tokens; None leaves it to the model's own config.json."""


def launch(source: str, config: ServeConfig) -> int:
    """Serve `source` with vLLM. Does not return on POSIX systems; returns vLLM's exit code elsewhere.

    Raises UsageError for settings without a counterpart in vLLM, UserError when vLLM is not installed or does
    not support the model.
    """
    check(config)
    key, program = passed_key(), find_program()
    handed = hand_over(source, config.dtype)
    arguments = command(handed, config.name or source, config)
    # Printed without --engine_args, which may contain keys.
    told = arguments[: len(arguments) - len(config.engine_args)]
    print(f"handing over to vLLM: {program} {' '.join(told)}", file=sys.stderr, flush=True)
    if key:
        os.environ[KEY] = key  # not --api-key: arguments are visible in the list of processes
    return become(program, arguments)


def passed_key() -> str:
    """The key that clients of vLLM must send; empty when none is set. Raises UserError for several keys, or
    two variables that differ.

    A file of hashed keys (--api_keys) has no counterpart: vLLM needs the keys themselves.
    """
    from chatwright.serve.operation.keys import VARIABLE

    ours = [key for key in (part.strip() for part in os.environ.get(VARIABLE, "").split(",")) if key]
    theirs = os.environ.get(KEY, "")
    if len(ours) > 1:
        raise UserError(
            f"{VARIABLE} holds {len(ours)} keys; vLLM takes one that way (more: its --api-key in "
            "--engine_args)"
        )
    if ours and theirs and ours != [theirs]:
        raise UserError(f"{VARIABLE} and {KEY} hold different keys; unset one of them")
    return ours[0] if ours else theirs


def check(config: ServeConfig) -> None:
    """Raise UsageError for a setting that cannot be passed on, UserError for a server open to everybody."""
    for field in dataclasses.fields(config):
        factory = field.default_factory
        usual = field.default if factory is dataclasses.MISSING else factory()
        if field.name not in CARRIED and getattr(config, field.name) != usual:
            raise UsageError(
                f"--{field.name} has no counterpart in vLLM: leave it out; vLLM's own options go into "
                "--engine_args"
            )
    keys = any(part.startswith("--api-key") for part in config.engine_args)
    if not (is_loopback(config.host) or config.insecure or keys or passed_key()):
        raise UserError(
            f"--host {config.host}: everybody who reaches this machine could use the model. Give it a key "
            f"(the environment variable {KEY} or CHATWRIGHT_API_KEYS); or, where nobody else is in reach, "
            "--insecure"
        )
    if config.port == 0:
        raise UsageError("--port 0: vLLM does not pick a free port; name one")
    if config.dtype not in ("auto", *DTYPES):
        raise UsageError(
            f"--dtype {config.dtype} means chatwright's CPU kernels; with --engine vllm take auto, fp32 or "
            "bf16, and vLLM's own quantisation through --engine_args"
        )


def find_program() -> str:
    """The program `vllm`: beside this Python, else on PATH. Raises UserError when there is none."""
    found = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    if found is None:
        raise UserError(
            "--engine vllm: there is no program `vllm` here; install it: pip install vllm (or "
            "'chatwright[vllm]')"
        )
    return found


def hand_over(source: str, dtype: str) -> Handed:
    """The model for vLLM, exported if it is not in transformers' format. Raises UserError."""
    if source.startswith("hf:"):
        return Handed(source.removeprefix("hf:"), DTYPES.get(dtype))
    from chatwright.language_model import find_checkpoint

    path = Path(source)
    if path.is_dir() and find_checkpoint(path) is None and (path / "config.json").is_file():
        return Handed(str(path.resolve()), DTYPES.get(dtype))
    directory = exported(source, dtype)
    from chatwright.files import read_json
    from chatwright.interop.families import config_from_hf

    values = read_json(directory / "config.json")
    return Handed(str(directory), str(values["dtype"]), config_from_hf(values).context)


def exported(source: str, dtype: str) -> Path:
    """The export of a model in the cache folder, made if it is not there. Raises UserError.

    `auto` means the same as without vLLM: bfloat16 for models of WORTH_COMPILING parameters and more, else
    float32.
    """
    from chatwright import __version__
    from chatwright.data.archives import cache_dir

    key = hashlib.sha256(json.dumps([__version__, dtype, fingerprint(source)]).encode()).hexdigest()[:16]
    label = re.sub(r"[^\w.-]+", "-", Path(source).stem)[:40].strip(".-") or "model"
    target = cache_dir() / "vllm" / f"{label}-{key}"
    if (target / "config.json").is_file():  # the export is complete: it appears whole or not at all
        print(f"exported before: {target}", file=sys.stderr)
        return target
    from chatwright.generation_config import own_default
    from chatwright.interop.export import write_export
    from chatwright.interop.leaving import family_name
    from chatwright.language_model import WORTH_COMPILING, load_parts

    parts = load_parts(source)
    if parts.generation is None:  # vLLM's own default would be a temperature of 1
        parts = dataclasses.replace(parts, generation=own_default())
    if parts.tokenizer is None:
        raise UserError(f"{source} has no tokenizer beside its weights: nobody could talk to it")
    family = family_name(parts.model.config)
    if family not in FAMILIES:
        raise UserError(
            f"{source}: vLLM has no {family}; serve it with chatwright's own engine (leave --engine out)"
        )
    if dtype == "auto":
        dtype = "bf16" if parts.model.parameter_count() >= WORTH_COMPILING else "fp32"
    print(f"exporting {source} for vLLM, once: {target}", file=sys.stderr, flush=True)
    write_export(parts, target, form="hf", dtype=dtype, verify=True, source=source)
    return target


def fingerprint(source: str) -> str:
    """A hash that changes when the model changes: of state.json, which has every file's checksum, or of a
    .gguf file.

    Raises UserError when there is no such model.
    """
    from chatwright import files
    from chatwright.language_model import find_checkpoint

    path = Path(source)
    if source == "smollm2":
        from chatwright.data.archives import smollm2_gguf

        path = smollm2_gguf()
    if path.is_file() and path.suffix == ".gguf":
        return files.sha256(path)
    found = find_checkpoint(path) if path.exists() else None
    if found is None:
        raise UserError(
            f"no model {source!r}: it is no directory with a model, and no .gguf file; also known: smollm2, "
            "hf:owner/name"
        )
    said = (found.path / "state.json").read_bytes()
    if not found.state().get("files"):  # written by hand, without the checksums of the other files
        others = sorted(file for file in found.path.iterdir() if file.is_file())
        said += "".join(map(files.sha256, others)).encode()
    return hashlib.sha256(said).hexdigest()


def command(handed: Handed, name: str, config: ServeConfig) -> list[str]:
    """The arguments of `vllm`. Those of --engine_args come last: vLLM takes the last of a repeated option."""
    options: dict[str, Any] = {
        "--host": config.host,
        "--port": config.port,
        "--served-model-name": name,
        "--max-model-len": handed.context,
        "--dtype": handed.dtype,
        "--generation-config": "vllm" if config.defaults == "openai" else None,  # auto: the model's own
    }
    given = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
    return ["serve", handed.model, *given, *config.engine_args]


def become(program: str, arguments: list[str]) -> int:
    """Replace this process by a program, which gets its signals and gives the exit code. On Windows, which
    cannot do this, run the program as a child process."""
    if os.name == "posix":
        _replace(program, [program, *arguments])
    return subprocess.call([program, *arguments])


def _replace(program: str, command: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(program, command)
    except OSError as error:
        raise UserError(f"{program} cannot be started: {error.strerror}") from None
