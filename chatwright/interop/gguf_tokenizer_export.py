"""A tokenizer in a GGUF file's metadata, such that llama.cpp gets the same tokens.

The reader's tables (gguf_tokenizer.py), applied backwards. What llama.cpp would do otherwise for some text is
refused, or told where its own converter writes it, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from chatwright.config import UserError
from chatwright.interop import gguf_tokenizer as reading
from chatwright.interop.leaving import Ends, chats_begin_like_texts
from chatwright.interop.loaded import Loaded
from chatwright.interop.spm import scores_of
from chatwright.token_spelling import BYTE_TOKEN, SPACE
from chatwright.tokenizer import Tokenizer
from chatwright.tokenizer_parts import parts_of


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's keys, and what there is to say."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer's keys, with names for all `size` rows of the model's table. Raises UserError for what
    llama.cpp would do otherwise."""
    content = json.loads(tokenizer.to_json())
    _check_model(content)
    if tokenizer.spelling.decoding.byte_level:
        return _byte_level(tokenizer, content, size)
    return _sentencepiece(tokenizer, content, size)


def _check_model(content: Mapping[str, Any]) -> None:
    """Raise UserError for what none of llama.cpp's tokenizers does."""
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer is of type {model.get('type')}, and only BPE can be written")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f"the tokenizer has {name} = {model[name]!r}, which llama.cpp's BPE does not")
    for token in content.get("added_tokens", []):
        strange = [
            name for name in ("single_word", "lstrip", "rstrip") if token.get(name) and not token["special"]
        ]
        if strange:
            raise UserError(
                f"the tokenizer's {token['content']!r} has {strange[0]}, which llama.cpp does not"
            )


def _rows(tokenizer: Tokenizer, size: int) -> tuple[dict[int, str], list[str]]:
    """The tokens by their ids, and names for all rows of the model's table."""
    spelling = {
        number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()
    }
    tokens = [spelling.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(tokens)) != size:
        raise UserError("the tokenizer has tokens called [PAD...], as llama.cpp calls the unused ones")
    return spelling, tokens


def _added(content: Mapping[str, Any]) -> dict[int, int]:
    """The types of the added tokens by their ids."""
    return {
        token["id"]: reading.CONTROL if token["special"] else reading.USER_DEFINED
        for token in content.get("added_tokens", [])
    }


# ---- byte-level BPE ----------------------------------------------------------------------------------------


def _byte_level(tokenizer: Tokenizer, content: Mapping[str, Any], size: int) -> Vocabulary:
    notes = []
    model, pre = content["model"], pre_name(tokenizer)
    if model.get("byte_fallback"):
        raise UserError("the tokenizer has byte_fallback = True, which llama.cpp's byte-level BPE does not")
    normalizer = content.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        raise UserError(
            f"the tokenizer normalises text first ({normalizer.get('type')}), which llama.cpp does not"
        )
    if normalizer:
        notes.append(
            "llama.cpp does not compose characters first (NFC): a letter that is typed as two, a base and an "
            "accent, becomes other tokens there."
        )
    if pre in reading.NEARLY:
        notes.append(
            f"llama.cpp's {pre} tells capitals from small letters by ASCII alone: words with capitals such "
            "as É inside become other tokens there."
        )
    spelling, tokens = _rows(tokenizer, size)
    kinds = _added(content)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not pairs:
        raise UserError("the tokenizer has not a single merge, and llama.cpp reads none without")
    if any(" " in part for pair in pairs for part in pair):
        raise UserError("the tokenizer merges pieces with spaces in them: it is not byte-level BPE")
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds.get(number, reading.NORMAL) if number in spelling else reading.UNUSED
            for number in range(size)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    return Vocabulary(values, tuple(notes))


def _pre_tokenizer(backend: tokenizers.Tokenizer) -> Any:
    """How a tokenizer cuts text, as JSON, without what changes no ids.

    Contractions are spelled out: llama.cpp reads the published (?i:'s|'t|...) so too (see PATTERN for the
    difference).
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key != "trim_offsets"}
        if isinstance(value, str):
            return value.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", reading.CONTRACTIONS)
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(backend.to_str())["pre_tokenizer"])


def pre_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text before merging. Raises UserError when it has none."""
    wanted, seen = _pre_tokenizer(tokenizer.backend), ""
    whole_words = bool(json.loads(tokenizer.to_json())["model"].get("ignore_merges"))
    for name, pre_tokenizer in reading.PRE_TOKENIZERS.items():
        known = tokenizers.Tokenizer(tokenizers.models.BPE())
        known.pre_tokenizer = pre_tokenizer
        if _pre_tokenizer(known) == wanted:
            seen = seen or name
            if whole_words == (name in reading.BEGINS):
                return name
    if seen:
        raise UserError(
            f"the tokenizer has ignore_merges = {whole_words}, and llama.cpp's {seen} means {not whole_words}"
        )
    raise UserError(
        "the tokenizer cuts text in a way that llama.cpp has no name for, and it would see other tokens "
        f"there (known: {', '.join(reading.PRE_TOKENIZERS)}; tokenizers that chatwright trains now are qwen2)"
    )


# ---- SentencePiece -----------------------------------------------------------------------------------------


def _sentencepiece(tokenizer: Tokenizer, content: Mapping[str, Any], size: int) -> Vocabulary:
    model = content["model"]
    prefix, notes = _space_prefix(content)
    spelling, tokens = _rows(tokenizer, size)
    single = tokenizer.spelling.single
    if not model.get("byte_fallback") or len(set(single.values())) != 256:
        raise UserError("the tokenizer has no token for each single byte, and llama.cpp reads none without")
    if model.get("ignore_merges"):
        raise UserError("the tokenizer takes whole words first (ignore_merges), which llama.cpp does not")
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
    kinds = _added(content)
    unknown = model.get("unk_token")
    for number, token in spelling.items():
        if token == unknown:
            kinds[number] = reading.UNKNOWN
        elif number in single:
            kinds[number] = reading.BYTE
        elif kinds.get(number) == reading.USER_DEFINED and SPACE in token:
            # Text never holds the sign itself: merges make this token of spaces, as of any piece.
            del kinds[number]
    pieces = [token for number, token in spelling.items() if number not in kinds]
    if any(BYTE_TOKEN.fullmatch(token) for token in pieces):
        raise UserError("the tokenizer has two tokens for a byte, and llama.cpp knows one")
    scores = scores_of(pieces, merges)
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [
            scores.get(spelling[number], 0.0) if number in spelling else -1e4 for number in range(size)
        ],
        "tokenizer.ggml.token_type": [
            kinds.get(number, reading.NORMAL) if number in spelling else reading.UNUSED
            for number in range(size)
        ],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    if unknown in tokens:
        values["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    return Vocabulary(values, notes)


def _space_prefix(content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a space is put in front of a text, and what there is to say. Raises UserError for another
    treatment of text than replacing spaces by their sign."""
    normal = [one for one in parts_of(content.get("normalizer")) if one.get("type") != "Sequence"]
    cuts = [one for one in parts_of(content.get("pre_tokenizer")) if one.get("type") != "Sequence"]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    nowhere = [one for one in cuts if one.get("type") == "Split" and one.get("pattern") == {"String": " "}]
    if cuts == nowhere and normal == [replaced]:
        return False, ()  # Gemma's; the cut at spaces finds none, for they are signs by then
    if cuts == nowhere and sorted(map(str, normal)) == sorted(map(str, (prepended, replaced))):
        return True, ()
    if not normal and len(cuts) == 1 and cuts[0].get("type") == "Metaspace":
        if cuts[0].get("replacement") != SPACE or cuts[0].get("split", True):
            raise UserError("the tokenizer cuts text at spaces (Metaspace, split), which llama.cpp does not")
        if cuts[0].get("prepend_scheme", "always") == "never":
            return False, ()
        return True, (
            "llama.cpp puts a space in front of every text, also of one that begins with a space already, "
            "where this tokenizer puts none.",
        )
    kinds = [str(one.get("type")) for one in (*normal, *cuts)]
    raise UserError(
        f"the tokenizer treats text otherwise than llama.cpp's SentencePiece does ({', '.join(kinds)})"
    )


# ---- roles -------------------------------------------------------------------------------------------------


def roles(parts: Loaded, tokenizer: Tokenizer, ends: Ends) -> Vocabulary:
    """The keys for what stands around a text and what ends an answer. Raises UserError for what llama.cpp
    cannot put there."""
    frame, names = tokenizer.frame, tokenizer.name
    sequence = tokenizer.control_ids.get(ends.sequence, tokenizer.end_of_text_id)
    if len(frame.begin) > 1 or frame.close not in ((), (sequence,)):
        around = " ".join(map(names, (*frame.begin, *frame.close)))
        raise UserError(f"the tokenizer puts {around} around a text; llama.cpp has one begin token alone")
    begins = bool(frame.begin) and chats_begin_like_texts(parts, tokenizer)
    values: dict[str, Any] = {
        "tokenizer.ggml.bos_token_id": frame.begin[0] if frame.begin else tokenizer.end_of_text_id,
        "tokenizer.ggml.eos_token_id": sequence,
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": bool(frame.close),
    }
    notes: list[str] = []
    if frame.begin and not begins:
        values[reading.TEXT_BEGINS] = list(frame.begin)
        notes.append(
            f"llama.cpp puts its begin token in front of texts and of conversations, or of neither. This "
            f"model's texts begin with {names(frame.begin[0])} and its conversations do not: the file is "
            "written for conversations."
        )
    others = sorted(tokenizer.end_ids - {sequence})
    turn = tokenizer.control_ids.get(ends.turn) if ends.turn else None
    first = [turn] if turn is not None else []
    for role, number in zip(("eot", "eom"), [*first, *(one for one in others if one != turn)], strict=False):
        values[f"tokenizer.ggml.{role}_token_id"] = number
    left = [*first, *(one for one in others if one != turn)][2:]
    if left:
        notes.append(
            "llama.cpp has keys for three ends of an answer; it is not told of "
            f"{', '.join(map(names, left))}."
        )
    return Vocabulary(values, tuple(notes))
