"""On what an adapter belongs: the model that it was trained over, and the adapters that were in it already.

PPO trains its adapter over the result of SFT, which may itself be a model with an adapter. The two then
belong together: PPO's alone, over the model that SFT began with, is another model. So an adapter's header has
a note with its origin, its README.md says it to people, and `chatwright export --format peft` writes all of
them, merged into one adapter or side by side.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors

from chatwright import files
from chatwright.config import UserError
from chatwright.model_names import SMOLLM2_HUB, is_pair, split_pair

SETTINGS, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
FOLDER = "adapter"
"""Where a finished stage has its adapter."""
NOTE = "chatwright.origin"
"""Key of the header's note."""
PACKED = "the packaged weights of smollm2 have 4 bits a number"
MOST = 16
"""Most adapters that lie on one another."""


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained over."""

    name: str
    """The model at the bottom, as chatwright names it: `smollm2`, `hf:owner/name`, a path."""
    hub: str = ""
    """What transformers and PEFT load it by: a name on the hub, or a whole path of a directory in their
    format; empty where there is none."""
    revision: str = ""
    """The commit on the hub, where it is known."""
    weights: str = ""
    """How its weights differ from those that `hub` names; empty where they do not."""
    adapters: tuple[str, ...] = ()
    """Directories of the adapters that were merged into it before, the first one first. In the header this
    path and others are relative to the adapter's own."""

    @property
    def loadable(self) -> str | None:
        """`base_model_name_or_path` for PEFT; None where a name would load something else than the adapter
        was trained over."""
        return None if self.adapters else self.hub or None


def is_adapter(directory: Path) -> bool:
    """Whether there is an adapter in a directory."""
    return (directory / SETTINGS).is_file()


def origin_of(base: str, beside: Path) -> Origin:
    """The origin of an adapter over the model `base`: a stage in the folder `beside`, or any other name of a
    model."""
    if is_pair(base):
        model, adapter = split_pair(base)
        return _over(Path(adapter), origin_of(model, beside))
    if base == "smollm2":
        return Origin("smollm2", SMOLLM2_HUB, weights=PACKED)
    if base.startswith("hf:"):
        return Origin(base, base.removeprefix("hf:"), _revision(base.removeprefix("hf:")))
    place = beside / base if (beside / base / "result.json").is_file() else Path(base)
    if not place.exists():
        return Origin(base)
    if is_adapter(place / FOLDER):
        return _over(place / FOLDER, read_origin(place / FOLDER) or Origin(str(place.resolve())))
    if (place / "config.json").is_file() and not (place / "state.json").is_file():
        return Origin(str(place.resolve()), str(place.resolve()))
    source = str(files.read_json(place / "state.json").get("source", "")) if _is_ours(place) else ""
    known = origin_of(source, beside) if source == "smollm2" or source.startswith("hf:") else Origin("")
    return Origin(str(place.resolve()), known.hub, known.revision, known.weights)  # taken over by `import`


def _is_ours(place: Path) -> bool:
    return (place / "state.json").is_file()


def _over(adapter: Path, under: Origin) -> Origin:
    """The origin of what is trained over `under` with this adapter merged into it."""
    found = read_origin(adapter) or under
    return Origin(
        found.name, found.hub, found.revision, found.weights, (*found.adapters, str(adapter.resolve()))
    )


def _revision(name: str) -> str:
    """The commit of a model in the hub's cache; empty where it is not known."""
    import huggingface_hub

    file = huggingface_hub.try_to_load_from_cache(name, "config.json")
    place = Path(file).parent if isinstance(file, str) else Path()
    return place.name if place.parent.name == "snapshots" else ""


def note_of(origin: Origin, directory: Path) -> str:
    """The note for the header of the adapter in `directory`, with paths relative to it: a run can be
    copied."""

    def told(place: str) -> str:
        return os.path.relpath(place, directory.resolve()) if Path(place).is_absolute() else place

    places = {"name": told(origin.name), "hub": told(origin.hub), "adapters": [*map(told, origin.adapters)]}
    return json.dumps(asdict(origin) | places)


def read_origin(directory: Path) -> Origin | None:
    """The origin in an adapter's header, with whole paths; None for an adapter of others. Raises UserError
    where it is damaged."""
    file = directory / WEIGHTS
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            text = (opened.metadata() or {}).get(NOTE)
    except (safetensors.SafetensorError, OSError):
        return None  # reading the adapter itself says what is wrong
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not _is_sane(values):
        raise UserError(f"{file}: the note {NOTE} in its header is damaged")

    def whole(place: str) -> str:
        return os.path.normpath(directory.resolve() / place) if place.startswith("../") else place

    places = {"name": whole(values["name"]), "hub": whole(values["hub"])}
    return Origin(**{**values, **places, "adapters": tuple(map(whole, values["adapters"]))})


def _is_sane(values: Any) -> bool:
    names = ("name", "hub", "revision", "weights")
    return (
        isinstance(values, dict)
        and set(values) == {*names, "adapters"}
        and all(isinstance(values[name], str) and len(values[name]) <= 4096 for name in names)
        and isinstance(values["adapters"], list)
        and len(values["adapters"]) <= MOST
        and all(isinstance(one, str) and len(one) <= 4096 for one in values["adapters"])
    )


def sentences(origin: Origin, directory: Path) -> list[str]:
    """What people must know about an adapter: on what it belongs, and which weights that has."""
    said = [f"A LoRA adapter over {origin.name}."]
    if origin.adapters:
        under = ", ".join(os.path.relpath(one, directory.resolve()) for one in origin.adapters)
        said.append(
            f"It was trained over that model with another adapter in it ({under}), and belongs on both: over "
            "the model alone it computes something else. `chatwright export STAGE DIR --format peft` writes "
            "them as one adapter (--adapters merged) or side by side (--adapters stacked)."
        )
    if origin.weights:
        said.append(
            f"It was trained over rounded weights: {origin.weights}. Over the full weights of {origin.hub} "
            "it computes nearly the same, not exactly; `chatwright export STAGE DIR --format peft "
            "--with_base` also writes the weights that it was trained over."
        )
    if not origin.hub:
        said.append(
            f"PEFT cannot load {origin.name} by a name: `chatwright export STAGE DIR --format peft` writes "
            "the model in transformers' format beside the adapter."
        )
    return said


def model_card(origin: Origin, directory: Path) -> str:
    """README.md of an adapter, with the header that the hub reads."""
    head = ["---", "library_name: peft"]
    head += [f"base_model: {origin.hub}"] if origin.hub and not Path(origin.hub).is_absolute() else []
    lines = [*head, "---", "", *(f"{text}\n" for text in sentences(origin, directory))]
    name = "+".join([origin.name, *(os.path.relpath(one) for one in origin.adapters)])
    lines += [f"In chatwright: `chatwright chat {name}+THIS_FOLDER`."]
    return "\n".join(lines) + "\n"
