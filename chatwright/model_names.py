"""The names by which models are asked for: runs, directories, `smollm2`, `hf:owner/name`, BASE+ADAPTER.

language_model.py loads what they mean. Here is what can be said about a name without loading anything, nor
importing torch: commands use it before they know that they will need it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""On the Hugging Face hub, the model that `smollm2` has in four bits a number."""

_HUB = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)(?<!\.jsonl)(?<!\.json)(?<!\.txt)", re.ASCII
)
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?", re.ASCII)


def is_pair(name: str) -> bool:
    """Whether a name means BASE+ADAPTER."""
    return "+" in name.strip("+") and not Path(name).exists()


def split_pair(name: str) -> tuple[str, str]:
    """The names of base and adapter in BASE+ADAPTER. Both may contain a +: the name is split where the rest
    is a directory, else at the last +."""
    places = [at for at, character in enumerate(name) if character == "+" and 0 < at < len(name) - 1]
    at = next((at for at in places if Path(name[at + 1 :]).is_dir()), places[-1])
    return name[:at], name[at + 1 :]


def is_known(name: str) -> bool:
    """Whether a name means a model without being a path: `smollm2`, `hf:owner/name`, or BASE+ADAPTER whose
    parts are there. Nothing is loaded."""
    if is_pair(name):
        base, adapter = split_pair(name)
        return (is_known(base) or Path(base).exists()) and Path(adapter).is_dir()
    return name == "smollm2" or name.startswith("hf:")


def near_hub(name: str) -> str:
    """The end of an error about a model that is not there: '; did you mean hf:owner/name?' where the name
    looks like one of the hub, or that of a packaged model; else empty."""
    address = _ADDRESS.fullmatch(name)
    if address:
        return f"; did you mean hf:{address[1]}?"
    if _HUB.fullmatch(name) and not Path(name).parent.exists() and Path(name).parent.name != "runs":
        return f"; did you mean hf:{name}?"
    return "; did you mean smollm2?" if difflib.get_close_matches(name.lower(), ["smollm2"], 1, 0.7) else ""


def weights_note(name: str) -> str:
    """A line for people where a name means rounded weights; else empty."""
    if name.partition("+")[0] != "smollm2":
        return ""
    return (
        f"smollm2 comes in a package with 4-bit weights (Q4_1, 98 MB). The full ones are hf:{SMOLLM2_HUB} "
        "(about 270 MB from the hub, which needs the network once). An adapter belongs on the weights that "
        "it was trained over"
    )


def unfinished(name: str, source: str) -> str:
    """A line for people where the model `name` comes from a run or a stage that is not finished; else empty.

    `source` is where it was found (`Loaded.source`): the directory of a checkpoint.
    """
    path, found = Path(name), Path(source)
    if not path.is_dir() or any((path / file).is_file() for file in ("state.json", "result.json")):
        return ""
    again = "the command that began it goes on from there"
    if found.parent == path / "checkpoints":
        return f"{path} is not finished: this is its checkpoint of step {_step(found)}; {again}"
    waiting = unfinished_stages(path)
    if not waiting or not found.is_relative_to(path):
        return ""
    stage = found.relative_to(path).parts[0]
    return (
        f"{path} is not finished: {', '.join(waiting)} has no result yet, so this is the model of the stage "
        f"{stage} (step {_step(found)}); {again}"
    )


def _step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def unfinished_stages(run: Path) -> list[str]:
    """The names of the stages of a run that were begun and have no result."""
    begun = sorted(file.parent for file in run.glob("*/clock.json"))
    return [one.name for one in begun if ".old-" not in one.name and not (one / "result.json").is_file()]
