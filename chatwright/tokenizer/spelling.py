"""What tokens stand for: bytes, or pieces of text with a sign for the space.

Two kinds of vocabularies are read. A byte-level one (GPT-2, Llama 3, Qwen) writes each byte as a printable
character; a text is all its tokens' bytes. A SentencePiece one (Llama 2, Mistral, Gemma) writes pieces of
text in which `▁` stands for a space, and tokens such as `<0x0A>` for single bytes. There a run of byte tokens
is text when it is UTF-8 as a whole; else each of its bytes is U+FFFD. That is what the decoders of the
`tokenizers` library do, and so what transformers shows.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chatwright.config import UserError

SPACE = "▁"
"""SentencePiece's sign for a space, U+2581."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_SIGN = 16
"""Most characters of what a decoder replaces, and of what it puts there."""


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE -> that byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer's decoder makes text of tokens."""

    byte_level: bool = True
    """Each character of a token is a byte; else tokens are pieces of text, and the rest of this counts."""
    replaced: tuple[tuple[str, str], ...] = ()
    """What is replaced in each piece, and by what."""
    byte_tokens: bool = False
    """Whether `<0x0A>` stands for a byte."""
    strip: int = 0
    """Most spaces that are left out at the beginning of a text."""
    sign: str = ""
    """The sign for a space that the first token of a text loses wherever it stands (the decoder Metaspace);
    empty for none."""


BYTE_LEVEL = Decoding()


def decoding_of(content: Mapping[str, Any], where: str) -> Decoding:
    """How the decoder of a tokenizer.json makes text. Raises UserError naming a decoder that is not known.

    A file without a decoder is byte-level.
    """
    decoder = content.get("decoder")
    if decoder is None:
        return BYTE_LEVEL
    steps = _steps(decoder, where)
    kinds = [str(one.get("type"))[:80] for one in steps]
    if "ByteLevel" in kinds:
        strange = [kind for kind in kinds if kind not in ("ByteLevel", "Fuse")]
        if strange or kinds.count("ByteLevel") > 1:
            raise UserError(f"{where}: its decoder joins ByteLevel with {', '.join(strange) or 'another'}")
        return BYTE_LEVEL
    return _of_pieces(steps, kinds, where)


def _steps(decoder: Any, where: str) -> list[dict[str, Any]]:
    """The decoders of a sequence, in order."""
    inner = decoder.get("decoders") if isinstance(decoder, dict) else None
    found = inner if isinstance(inner, list) and decoder.get("type") == "Sequence" else [decoder]
    if not found or len(found) > 16 or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{where}: its decoder is damaged, or has too many parts")
    return found


def _of_pieces(steps: list[dict[str, Any]], kinds: list[str], where: str) -> Decoding:
    """A decoder of pieces: Replace, ByteFallback, Fuse, Strip in this order, or Metaspace alone."""
    order = {"Replace": 0, "Metaspace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    strange = [kind for kind in kinds if kind not in order]
    if strange:
        raise UserError(
            f"{where}: its decoder {strange[0]!r} is not supported, only ByteLevel, {', '.join(order)}"
        )
    places = [order[kind] for kind in kinds]
    twice = any(kinds.count(kind) > 1 for kind in ("Metaspace", "ByteFallback", "Strip"))
    if places != sorted(places) or twice or ("Strip" in kinds and "Fuse" not in kinds):
        raise UserError(f"{where}: its decoder has parts in an order that is not supported: {kinds}")
    replaced: list[tuple[str, str]] = []
    strip, sign = 0, ""
    for one, kind in zip(steps, kinds, strict=True):
        if kind == "Replace":
            replaced.append(_replacement(one, where))
        elif kind == "Metaspace":
            space = one.get("replacement")
            if not isinstance(space, str) or len(space) != 1:
                raise UserError(f"{where}: its decoder Metaspace has the sign {space!r:.80}")
            replaced.append((space, " "))
            scheme = one.get("prepend_scheme", "always" if one.get("add_prefix_space", True) else "never")
            sign = "" if scheme == "never" else space
        elif kind == "Strip":
            start, stop = one.get("start"), one.get("stop")
            fits = type(start) is int and 0 <= start <= LONGEST_SIGN
            if one.get("content") != " " or stop != 0 or not fits:
                raise UserError(f"{where}: its decoder strips other things than spaces in front of a text")
            strip = int(start)  # type: ignore[arg-type]
    return Decoding(False, tuple(replaced), "ByteFallback" in kinds, strip, sign)


def _replacement(step: Mapping[str, Any], where: str) -> tuple[str, str]:
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if not isinstance(text, str) or not isinstance(content, str) or not 0 < len(text) <= LONGEST_SIGN:
        raise UserError(f"{where}: its decoder replaces {str(pattern)[:80]!r}: only short texts can be")
    if len(content) > LONGEST_SIGN:
        raise UserError(f"{where}: its decoder writes a text of {len(content):,} characters for a sign")
    return text, content


class Decoder(Protocol):
    """Text from tokens that come one by one."""

    def push(self, number: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def flush(self) -> str:
        """What is left."""
        ...

    def pending(self) -> str:
        """Whole characters that are held back although they may be all; `flush` would give them."""
        ...


class Spelling:
    """What each token of a vocabulary stands for."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        size: int,
        *,
        nothing: Iterable[int],
        added: Iterable[int],
        decoding: Decoding,
    ) -> None:
        """`nothing` are the tokens that stand for no text (controls), `added` those that are spelled as they
        are."""
        self.decoding = decoding
        self.data: list[bytes] = [b""] * size
        """The bytes of each token; none for controls, and for numbers that no token has."""
        self.single: dict[int, int] = {}
        """Token -> byte, for the tokens that stand for one byte beside the text."""
        self.first: dict[int, str] = {}
        """What a token is at the beginning of a text, where that is something else."""
        silent, own = set(nothing), set(added)
        table = byte_alphabet()
        for token, number in vocabulary.items():
            if number in silent:
                continue
            if decoding.byte_level:
                spelled = number not in own and all(character in table for character in token)
                self.data[number] = bytes(map(table.__getitem__, token)) if spelled else token.encode("utf-8")
                continue
            byte = BYTE_TOKEN.fullmatch(token) if decoding.byte_tokens else None
            if byte:
                self.single[number] = int(byte.group(1), 16)
                self.data[number] = bytes([self.single[number]])
                continue
            self.data[number] = self._piece(token).encode("utf-8")
            if decoding.sign and decoding.sign in token:
                self.first[number] = self._piece(token.replace(decoding.sign, ""))
        self.silent = frozenset(silent)

    def _piece(self, token: str) -> str:
        for old, new in self.decoding.replaced:
            token = token.replace(old, new)
        return token

    def byte_ids(self, vocabulary: Mapping[str, int]) -> dict[int, int]:
        """Byte -> the token that stands for it alone."""
        if not self.decoding.byte_level:
            return {byte: number for number, byte in self.single.items()}
        found = {byte: vocabulary.get(character) for character, byte in byte_alphabet().items()}
        return {byte: number for byte, number in found.items() if number is not None}

    def decoder(self, *, continues: bool) -> Decoder:
        """A decoder of tokens that come one by one. `continues`: they go on in the middle of a text."""
        return _Bytes(self.data) if self.decoding.byte_level else _Pieces(self, continues=continues)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, as transformers decodes them without control tokens."""
        if self.decoding.byte_level:
            return self.bytes_of(ids).decode("utf-8", errors="replace")
        decoder = self.decoder(continues=False)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of a text's tokens; those that are not UTF-8 stay what they are."""
        if self.decoding.byte_level:
            return b"".join(self.data[number] for number in ids)
        parts, started = [], not self.first
        for number in ids:
            if not started and self.data[number]:
                started = True
                parts.append(self.first[number].encode() if number in self.first else self.data[number])
            else:
                parts.append(self.data[number])
        whole = b"".join(parts)
        spaces = len(whole) - len(whole.lstrip(b" "))
        return whole[min(spaces, self.decoding.strip) :]


class _Bytes:
    """Of byte-level tokens: a character is given out once all its bytes have come."""

    def __init__(self, data: Sequence[bytes]) -> None:
        self._data = data
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, number: int) -> str:
        return self._decoder.decode(self._data[number])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def pending(self) -> str:
        return ""


class _Pieces:
    """Of pieces: a run of byte tokens is given out once it has ended, for the next one may make it no
    text."""

    def __init__(self, spelling: Spelling, *, continues: bool) -> None:
        self._spelling = spelling
        self._left = 0 if continues else spelling.decoding.strip
        self._first = not continues
        self._run = bytearray()

    def push(self, number: int) -> str:
        spelling = self._spelling
        if number in spelling.silent:  # the library leaves them out before it looks at runs
            return ""
        byte = spelling.single.get(number)
        if byte is not None:
            self._first = False
            self._run.append(byte)
            return ""
        data = spelling.data[number]
        text = data.decode("utf-8")
        if data and self._first:
            text, self._first = spelling.first.get(number, text), False
        return self._stripped(self._ended() + text)

    def flush(self) -> str:
        return self._stripped(self._ended())

    def pending(self) -> str:
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            return ""
        return text[min(self._left, len(text) - len(text.lstrip(" "))) :]

    def _ended(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._left and text.startswith(" "):
            text, self._left = text[1:], self._left - 1
        if text:
            self._left = 0
        return text
