"""The tokenizer of a model directory in transformers' format, as its makers mean it.

tokenizer.json holds the vocabulary. What stands in front of a text and which tokens end an answer is also
said in tokenizer_config.json, generation_config.json and config.json; the rules here are those of
transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatwright import generation_config
from chatwright.config import UserError
from chatwright.files import read_json
from chatwright.generation_config import end_ids_of
from chatwright.interop.loaded import end_of_text, located
from chatwright.text_frame import TextFrame, of_post_processor
from chatwright.tokenizer import Tokenizer

ROLES = ("bos_token", "eos_token")
"""The roles of tokens that are read."""
SWITCHES = ("add_bos_token", "add_eos_token")
"""Settings that say whether a text begins and ends with these tokens, where tokenizer.json's post-processor
does not. transformers 4 obeyed them for some families, and llama.cpp's converter does; transformers 5 leaves
them aside where there is a tokenizer.json."""


def special_tokens(
    directory: Path, settings: Mapping[str, Any], roles: Sequence[str] = ROLES
) -> dict[str, str | None]:
    """The names of the tokens that play these roles, from tokenizer_config.json or, in older directories,
    special_tokens_map.json; None where there is none."""
    older: Any = {}
    file = directory / "special_tokens_map.json"
    if file.is_file() and not all(name in settings for name in roles):
        older = read_json(file)
    older = older if isinstance(older, dict) else {}
    return {name: token_name(settings[name] if name in settings else older.get(name)) for name in roles}


def token_name(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def read_tokenizer(directory: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a directory. `content` is its tokenizer.json, `settings` its tokenizer_config.json.

    Raises UserError for a kind that is not read, and for settings that contradict the vocabulary.
    """
    file = directory / "tokenizer.json"
    named = special_tokens(directory, settings)
    _check_kind(content, file)
    found = content.get("added_tokens")
    added = [token for token in (found if isinstance(found, list) else []) if isinstance(token, dict)]
    controls = [str(token.get("content")) for token in added if token.get("special")]
    own = of_post_processor(content, str(file))
    tokenizer = Tokenizer.load(
        file,
        end_of_text=end_of_text(controls, named["eos_token"], where=str(file)),
        frame=own or TextFrame(source="tokenizer.json puts nothing there"),
    )
    where = str(directory / "tokenizer_config.json")
    frame = tokenizer.frame
    if own is None and any(settings.get(name) for name in SWITCHES):
        frame = _by_switches(tokenizer, named, settings, where)
    end = named["eos_token"]
    number = tokenizer.backend.token_to_id(end) if end is not None else None
    if number is not None:
        frame = frame.with_ends([number], "eos_token of tokenizer_config.json")
    for name in (generation_config.FILE, "config.json"):
        if (directory / name).is_file():
            values = read_json(directory / name)
            if isinstance(values, dict):
                ids = end_ids_of(values, str(directory / name))
                frame = frame.with_ends(ids, f"eos_token_id of {name}")
    with located(where):
        return tokenizer.framed(frame)


def _check_kind(content: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for a tokenizer.json that does not say how tokens become text."""
    if content.get("decoder") is None:
        raise UserError(
            f"{file}: it has no decoder, so that nobody knows what its tokens stand for; "
            "load_hf(..., tokenizer=False) reads the weights alone"
        )


def _by_switches(
    tokenizer: Tokenizer, named: Mapping[str, str | None], settings: Mapping[str, Any], where: str
) -> TextFrame:
    """What `add_bos_token` and `add_eos_token` put around a text."""
    ids: list[tuple[int, ...]] = []
    for switch, role in zip(SWITCHES, ROLES, strict=True):
        name = named[role]
        if not settings.get(switch) or name is None:
            ids.append(())
            continue
        number = tokenizer.backend.token_to_id(name)
        if number is None:
            raise UserError(f"{where}: {switch} is on, and the tokenizer has no token {name!r:.80} ({role})")
        ids.append((number,))
    given = " and ".join(name for name in SWITCHES if settings.get(name))
    return TextFrame(ids[0], ids[1], source=f"{given} of tokenizer_config.json")
