"""The tokenizer in a GGUF file's metadata, as llama.cpp understands it.

Two kinds are read: `gpt2`, byte-level BPE, whose way of cutting text llama.cpp knows by name, and `llama`,
SentencePiece's pieces with scores (spm.py). Where the metadata says nothing of a begin token, llama.cpp's own
rule holds: there is one for `llama` and for the ways of cutting in BEGINS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from chatwright.config import UserError
from chatwright.interop.loaded import end_of_text
from chatwright.interop.spm import merges_of
from chatwright.text_frame import TextFrame
from chatwright.token_spelling import SPACE
from chatwright.tokenizer import PATTERN, Tokenizer, library

# How text is cut before merging, by llama.cpp's name for it.
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pattern
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTION"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTION"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words are cut where small letters are followed by capitals."""


def _by(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _split(digits: str) -> pre_tokenizers.Sequence:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    return _by(PATTERN.replace(r"|\p{N}|", f"|{digits}|"))


CONTRACTIONS = PATTERN.partition("|[^")[0]
_THREE_DIGITS, _ONE_DIGIT = _split(r"\p{N}{1,3}"), _split(r"\p{N}")
_TEKKEN = _by(_CASES.replace("CONTRACTION", "").replace("DIGITS", r"\p{N}"))
_GPT_4O = _by(_CASES.replace("CONTRACTION", f"{CONTRACTIONS}?").replace("DIGITS", r"\p{N}{1,3}"))
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt", "exaone4"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"), _THREE_DIGITS),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _ONE_DIGIT),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT_4O),
}
"""Ways of cutting by their names. Of names for one way the first is written. Granite's and SmolLM's are
`smollm` (or `refact`), OLMo 2's and Granite 4's `dbrx`, Mistral's newer ones `tekken`, Phi-4-mini's `gpt-4o`.
"""
BEGINS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "tekken"})
"""Ways of cutting with which llama.cpp puts the begin token in front where a file does not say, and takes a
whole word first, if the vocabulary has it."""
NEARLY = frozenset({"tekken", "gpt-4o", "llama4"})
"""Ways of cutting whose capitals llama.cpp tells from small letters by ASCII alone."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of llama.cpp. Unused ones fill the vocabulary up to the size of the model's table."""
ENDS = ("eos", "eot", "eom")
"""Roles of tokens that end an answer: a sequence, a turn, a message."""


def items(values: Mapping[str, Any], name: str, kind: type[Any], where: str) -> list[Any]:
    """A list of metadata whose items are all of this kind; empty when absent."""
    found = values.get(name, [])
    if not isinstance(found, list) or any(type(item) is not kind for item in found):
        raise UserError(f"{where}: {name} is damaged: not a list of items of type {kind.__name__}")
    return found


def read_tokenizer(values: Mapping[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer that the metadata spells out; None when there is none. Raises UserError."""
    kind = values.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{where}: its tokenizer is of kind {kind!r:.80}; only byte-level BPE ('gpt2') and SentencePiece "
            "('llama') are supported, load_gguf(..., tokenizer=False) reads the weights alone"
        )
    tokens = items(values, "tokenizer.ggml.tokens", str, where)
    types = items(values, "tokenizer.ggml.token_type", int, where)
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: its list of tokens is damaged (missing types, or tokens that occur twice)")
    make = _byte_level if kind == "gpt2" else _sentencepiece
    backend = make(values, tokens, types, where)
    controls = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (CONTROL, UNKNOWN)]
    plain = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    end = end_of_text(controls, named(values, "eos", where), where=where)
    return Tokenizer(backend, end_of_text=end, controls=controls, frame=_frame(values, where))


def _byte_level(
    values: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> tokenizers.Tokenizer:
    kind = values.get("tokenizer.ggml.pre")
    if not isinstance(kind, str) or kind not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{where}: pre-tokenizer {kind!r:.80} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ")) for merge in items(values, "tokenizer.ggml.merges", str, where)]
    with library(f"{where}: its merges do not fit its tokens"):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=_used(tokens, types),
                merges=merges,  # type: ignore[arg-type,unused-ignore]
                ignore_merges=kind in BEGINS,
            )
        )
    backend.pre_tokenizer = PRE_TOKENIZERS[kind]
    backend.decoder = decoders.ByteLevel()
    return backend


def _used(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Token -> id, without those that only fill the vocabulary up."""
    pairs = enumerate(zip(tokens, types, strict=True))
    return {token: number for number, (token, type_) in pairs if type_ != UNUSED}


def _sentencepiece(
    values: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> tokenizers.Tokenizer:
    scores = items(values, "tokenizer.ggml.scores", float, where)
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise UserError(f"{where}: its tokens' scores are damaged (missing, or not finite)")
    pieces = {
        token: score for token, score, type_ in zip(tokens, scores, types, strict=True) if type_ == NORMAL
    }
    try:
        merges = merges_of(pieces)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    unknown = [token for token, type_ in zip(tokens, types, strict=True) if type_ == UNKNOWN]
    with library(f"{where}: its pieces make no tokenizer"):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=_used(tokens, types),
                merges=merges,
                unk_token=unknown[0] if unknown else None,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    spaces = normalizers.Replace(" ", SPACE)
    prefix = _switch(values, "add_space_prefix", True, where)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _switch(values: Mapping[str, Any], name: str, usual: bool, where: str) -> bool:
    found = values.get(f"tokenizer.ggml.{name}", usual)
    if not isinstance(found, bool):
        raise UserError(f"{where}: tokenizer.ggml.{name} is {found!r:.80}, neither true nor false")
    return found


def _frame(values: Mapping[str, Any], where: str) -> TextFrame:
    """What llama.cpp puts around a text, and which tokens end an answer there."""
    pieces = values["tokenizer.ggml.model"] == "llama"
    usual = pieces or values.get("tokenizer.ggml.pre") in BEGINS
    given = "tokenizer.ggml.add_bos_token" in values
    begin = number_of(values, "bos", where) if _switch(values, "add_bos_token", usual, where) else None
    close = number_of(values, "eos", where) if _switch(values, "add_eos_token", False, where) else None
    frame = TextFrame(
        () if begin is None else (begin,),
        () if close is None else (close,),
        source="tokenizer.ggml.add_bos_token" if given else "llama.cpp's rule for this kind of tokenizer",
    )
    if own := values.get(TEXT_BEGINS):  # llama.cpp has one key for texts and conversations
        numbers = items(values, TEXT_BEGINS, int, where) if isinstance(own, list) else []
        frame = TextFrame(tuple(numbers), frame.close, source=TEXT_BEGINS)
    for role in ENDS:
        number = number_of(values, role, where)
        frame = frame.with_ends([] if number is None else [number], f"tokenizer.ggml.{role}_token_id")
    return frame


TEXT_BEGINS = "chatwright.text_begin_ids"
"""Our own key: what stands in front of a text, where conversations begin otherwise. llama.cpp puts its begin
token in front of both or of neither."""


def number_of(values: Mapping[str, Any], role: str, where: str) -> int | None:
    """The id of the token that plays a role (bos, eos, eot), or None. Raises UserError for one that there is
    not."""
    usual = {"bos": 1, "eos": 2} if values.get("tokenizer.ggml.model") == "llama" else {}
    tokens = items(values, "tokenizer.ggml.tokens", str, where)
    number = values.get(f"tokenizer.ggml.{role}_token_id", usual.get(role))
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.{role}_token_id is {number!r:.80}, not one of its tokens")
    return number


def named(values: Mapping[str, Any], role: str, where: str) -> str | None:
    """The token that plays a role (bos, eos), or None."""
    number = number_of(values, role, where)
    if number is None:
        return None
    return str(items(values, "tokenizer.ggml.tokens", str, where)[number])
