"""Byte-level BPE: text <-> token ids (Sennrich et al. 2016, arXiv:1508.07909; bytes as in Radford et al.
2019, 2.2).

Training, encoding and the file format are those of the `tokenizers` library, so `tokenizer.json` loads in
transformers. Added here: any bytes round-trip, and text never becomes a control token, whatever it spells.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from chatwright.config import UserError

END_OF_TEXT = "<|endoftext|>"
CONTROLS = (
    END_OF_TEXT,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<|image|>",
    "<|reserved_0|>",
)
"""Control tokens of a tokenizer trained here: between documents, around turns, and room for what comes later.
"""

LARGEST_FILE = 64 << 20
"""Most bytes of a tokenizer.json; published ones have up to 35 MB."""
LARGEST_VOCABULARY = 1 << 24
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Sequence")
PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation", "Sequence")
"""The parts that a tokenizer.json may have. Others of the library can make texts any number of times longer,
or end the process when they are damaged; no byte-level BPE needs them."""

PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where merges stop: words with what stands before them, each digit alone, punctuation, white space.

Exactly what llama.cpp calls "qwen2": it does not read a pattern out of a model's file, it knows some by name,
so that a tokenizer with a pattern of its own could never be used there. Single digits also line up in sums.
Qwen's own spelling begins with (?i:'s|'t|...), which differs in one place: the old long s behind an
apostrophe counts as an s there.
"""


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE -> that byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back. `controls` are the tokens that text can never produce."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str = END_OF_TEXT,
        controls: Sequence[str] | None = None,
    ) -> None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        self.controls = tuple(controls if controls is not None else special)
        if end_of_text not in self.controls:
            raise UserError(
                f"the tokenizer has no control token {end_of_text!r} (it has {', '.join(self.controls)})"
            )
        self.end_of_text = end_of_text
        self.backend = backend
        if self.vocab_size > LARGEST_VOCABULARY:  # tables have a place for each id
            raise UserError(f"the tokenizer has the id {self.vocab_size - 1}: no model has so many tokens")
        self.backend.encode_special_tokens = True  # control tokens spelled out in text are text
        self.control_ids: dict[str, int] = {}
        for control in self.controls:
            number = backend.token_to_id(control)
            if number is None:
                raise UserError(f"the tokenizer's vocabulary lacks its control token {control!r}")
            self.control_ids[control] = number
        self.end_of_text_id = self.control_ids[end_of_text]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
        """Learn merges from `texts`. `vocab_size` counts control tokens and the 256 bytes, and is reached
        exactly or not at all: too little text gives a smaller vocabulary. Raises UserError when vocab_size is
        too small."""
        least = 256 + len(CONTROLS)
        if vocab_size < least:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and the control tokens need {least}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(control, special=True, normalized=False) for control in CONTROLS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, *, end_of_text: str | None = None) -> Tokenizer:
        """From a `tokenizer.json` or a directory that has one. Raises UserError when missing or broken.

        `end_of_text` names the token between documents; by default the first of the usual names that exists.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = _read(file)
        _check_parts(content, str(file))
        with library(f"{file} is not a tokenizer"):
            backend = tokenizers.Tokenizer.from_str(
                json.dumps(content)
            )  # what was checked, whatever the file spells
            # An encoded text is its own ids: none more, none less.
            backend.no_padding()
            backend.no_truncation()
        if not isinstance(backend.model, models.BPE):
            raise UserError(f"{file} is a tokenizer of kind {type(backend.model).__name__}, not BPE")
        if end_of_text is None:
            names = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
            usual = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
            end_of_text = next((name for name in usual if name in names), None)
            if end_of_text is None:
                raise UserError(
                    f"{file}: none of its special tokens ({', '.join(names) or 'none'}) ends a text"
                )
        return cls(backend, end_of_text=end_of_text)

    def save(self, directory: str | Path) -> Path:
        """Write `tokenizer.json` into a directory; returns its path."""
        file = Path(directory) / "tokenizer.json"
        file.write_text(self.to_json(), encoding="utf-8")
        return file

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self.backend.to_str())

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included, and those that no token has: the largest id and one
        more."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any change of the tokenizer's behaviour."""
        content = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Bytes that are not UTF-8, and lone surrogates, become single-byte tokens.

        Raises UserError when such a byte has no token; every byte has one in tokenizers that are trained
        here.
        """
        if isinstance(text, str):
            try:
                with library("the tokenizer fails on this text", TypeError):
                    return list(self.backend.encode(text, add_special_tokens=False).ids)
            except TypeError:  # a lone surrogate, which the library cannot take
                text = text.encode("utf-8", errors="surrogatepass")
        ids: list[int] = []
        for piece in _valid_pieces(text):
            if isinstance(piece, str):
                ids += self.encode(piece)
            else:
                ids += [self._byte_id(byte) for byte in piece]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        try:
            return [
                list(item.ids)
                for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except TypeError:
            return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; control tokens stand for none."""
        return b"".join(self._token_bytes[number] for number in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that do not form UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, number: int) -> bytes:
        """The bytes of one token."""
        return self._token_bytes[number]

    def name(self, number: int) -> str:
        """A token as the vocabulary spells it, for people to look at."""
        return str(self.backend.id_to_token(number))

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        table = byte_alphabet()
        controls = set(self.control_ids.values())
        added = {number: token.content for number, token in self.backend.get_added_tokens_decoder().items()}
        result = [b""] * (max(self.backend.get_vocab(with_added_tokens=True).values()) + 1)
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            if number in controls:
                continue
            if number in added or any(character not in table for character in token):
                result[number] = token.encode("utf-8")
            else:
                result[number] = bytes(table[character] for character in token)
        return result

    def _byte_id(self, byte: int) -> int:
        """The id of a single byte. Raises UserError when there is none: vocabularies that were learnt without
        all 256 bytes lack those that never occur in UTF-8."""
        number = self._byte_ids.get(byte)
        if number is None:
            raise UserError(f"the text is not UTF-8, and the tokenizer has no token for its byte {byte:#04x}")
        return number

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The id of each single byte that has one."""
        found = {byte: self.backend.token_to_id(character) for character, byte in byte_alphabet().items()}
        return {byte: number for byte, number in found.items() if number is not None}


@contextmanager
def library(trouble: str, *passing: type[Exception]) -> Iterator[None]:
    """Errors of the tokenizers library, its panics included, become a UserError that says what the trouble
    is."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception; a panic of its Rust is not even that
        own = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not own or isinstance(
            error, passing
        ):  # what is not the library's passes: Ctrl-C, a signal that ends a stage
            raise
        raise UserError(f"{trouble} ({error})") from None


def _read(file: Path) -> Any:
    """What a tokenizer.json says."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file} is larger than {LARGEST_FILE >> 20} MB: no tokenizer is")
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a tokenizer ({error})") from None


def _check_parts(content: Any, where: str) -> None:
    """Whether a tokenizer.json holds what we know. Raises UserError naming the part that we do not."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a tokenizer")
    for place, known in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        kinds = list(_kinds(content.get(place)))
        strange = [kind for kind in kinds if kind not in known]
        if strange:
            raise UserError(
                f"{where}: its {place} {strange[0]!r:.80} is not supported, only {', '.join(known)}"
            )
        if len(kinds) > 16 or kinds.count("ByteLevel") > 1:
            raise UserError(f"{where}: its {place} has too many parts")
    repeats = sum(
        len(one["single"])
        for one in _parts(content.get("post_processor"))
        if isinstance(one.get("single"), list)
    )
    if repeats > 16:
        raise UserError(f"{where}: its post_processor has too many parts")


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """The objects that make up a part of a tokenizer.json: itself, and those of a sequence."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            for name in ("normalizers", "pretokenizers", "processors"):
                inner = one.get(name)
                left += inner if isinstance(inner, list) else []


def _kinds(value: Any) -> Iterator[str]:
    return (str(one.get("type"))[:80] for one in _parts(value))


def _valid_pieces(data: bytes) -> Iterator[str | bytes]:
    """Cut bytes into the longest stretches of valid UTF-8 (as str) and what lies between (as bytes)."""
    while data:
        try:
            yield data.decode("utf-8")
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start].decode("utf-8")
            yield data[error.start : error.end]
            data = data[error.end :]


class TextStream:
    """Text from ids that come one by one; a character is given out once all its bytes have come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, number: int) -> str:
        """The text that this id completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(number))

    def flush(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
