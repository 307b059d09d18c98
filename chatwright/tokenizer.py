"""Text <-> token ids: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in Radford et al.
2019, 2.2), and SentencePiece's vocabularies (Kudo & Richardson 2018, arXiv:1808.06226) from elsewhere.

Training, encoding and the file format are those of the `tokenizers` library, so `tokenizer.json` loads in
transformers. Added here: any bytes round-trip, and text never becomes a control token, whatever it spells.
What tokens stand for is in token_spelling.py, what stands around a text in text_frame.py, which files are
read in tokenizer_parts.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from chatwright.config import UserError
from chatwright.text_frame import TRAINED_HERE, TextFrame, of_post_processor
from chatwright.token_spelling import Decoding, Spelling, byte_alphabet, decoding_of
from chatwright.tokenizer_parts import MODELS, library, read_content, without_prefix

__all__ = ["CONTROLS", "END_OF_TEXT", "PATTERN", "TextStream", "Tokenizer", "byte_alphabet", "library"]

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

LARGEST_VOCABULARY = 1 << 24

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


class Tokenizer:
    """Text to ids and back. `controls` are the tokens that text can never produce."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str = END_OF_TEXT,
        controls: Sequence[str] | None = None,
        frame: TextFrame | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        """`frame` says what stands around a text; by default the backend's post-processor, and where it has
        none the end-of-text token in front, for tokenizers that are trained here. `decoding` is what the
        backend's decoder does, by default. Raises UserError when a name or a number has no token."""
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
        self._decoding = decoding or decoding_of(_parts_of(backend), "the tokenizer")
        self.frame = self._checked(frame or self._own_frame())
        """What stands around a text, and what ends an answer."""

    def _own_frame(self) -> TextFrame:
        """What the backend's post-processor says; the end-of-text token for tokenizers trained here, which
        have none."""
        found = of_post_processor(_parts_of(self.backend), "the tokenizer")
        if found is None and set(CONTROLS) <= set(self.controls):
            found = TextFrame((self.control_ids[END_OF_TEXT],), source=TRAINED_HERE)
        return found or TextFrame(source="tokenizer.json puts nothing there")

    def _checked(self, frame: TextFrame) -> TextFrame:
        for number in (*frame.begin, *frame.close):
            if not (0 <= number < self.vocab_size and self.known[number]):
                raise UserError(f"the tokenizer puts the id {number} around a text, and has no such token")
        return frame

    def framed(self, frame: TextFrame) -> Tokenizer:
        """The same tokenizer with other things around a text. Raises UserError for ids without a token."""
        return Tokenizer(
            self.backend,
            end_of_text=self.end_of_text,
            controls=self.controls,
            frame=frame,
            decoding=self._decoding,
        )

    def dividing_documents(self) -> Tokenizer:
        """The same tokenizer with the end-of-text token in front of every text, as token shards have it
        (chatwright/data/shards.py): that of models that are pre-trained here."""
        return self.framed(replace(self.frame, begin=(self.end_of_text_id,), close=(), source=TRAINED_HERE))

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the end of text, and whatever else the model's makers name. Numbers that no
        token has are left out: they never come out of a model."""
        named = (number for number, _ in self.frame.ends)
        known = (number for number in named if number < self.vocab_size and self.known[number])
        return frozenset({self.end_of_text_id, *known})

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
    def load(
        cls, path: str | Path, *, end_of_text: str | None = None, frame: TextFrame | None = None
    ) -> Tokenizer:
        """From a `tokenizer.json` or a directory that has one. Raises UserError when missing or broken.

        `end_of_text` names the token between documents; by default the first of the usual names that exists.
        `frame` as in `__init__`.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = read_content(file)
        decoding = decoding_of(content, str(file))
        own = of_post_processor(content, str(file))
        with library(f"{file} is not a tokenizer"):
            backend = tokenizers.Tokenizer.from_str(
                json.dumps(content)
            )  # what was checked, whatever the file spells
            # An encoded text is its own ids: none more, none less.
            backend.no_padding()
            backend.no_truncation()
        if type(backend.model).__name__ not in MODELS:
            raise UserError(
                f"{file} is a tokenizer of kind {type(backend.model).__name__}, not {' or '.join(MODELS)}"
            )
        if end_of_text is None:
            names = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
            usual = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
            end_of_text = next((name for name in usual if name in names), None)
            if end_of_text is None:
                raise UserError(
                    f"{file}: none of its special tokens ({', '.join(names) or 'none'}) ends a text"
                )
        return cls(backend, end_of_text=end_of_text, frame=frame or own, decoding=decoding)

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
        parts = json.loads(self.to_json())
        if set(CONTROLS) <= set(self.controls):  # one trained here has no post-processor until it is exported
            parts["post_processor"] = None
        content = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """(vocab_size,): True for the ids that a token has."""
        found = np.zeros(self.vocab_size, dtype=np.bool_)
        found[list(self.backend.get_vocab(with_added_tokens=True).values())] = True
        return found

    def encode(self, text: str | bytes, *, continues: bool = False) -> list[int]:
        """Ids of a text. Bytes that are not UTF-8, and lone surrogates, become single-byte tokens.

        Some tokenizers put a space in front of a text; `continues` says that this one goes on where another
        ended, and gets none. Raises UserError when such a byte has no token; every byte has one in tokenizers
        that are trained here.
        """
        backend = self._continuing if continues else self.backend
        if isinstance(text, str):
            try:
                with library("the tokenizer fails on this text", TypeError):
                    return list(backend.encode(text, add_special_tokens=False).ids)
            except TypeError:  # a lone surrogate, which the library cannot take
                text = text.encode("utf-8", errors="surrogatepass")
        ids: list[int] = []
        for number, piece in enumerate(_valid_pieces(text)):
            if isinstance(piece, str):
                ids += self.encode(piece, continues=continues or number > 0)
            else:
                ids += [self._byte_id(byte) for byte in piece]
        return ids

    def encode_text(self, text: str | bytes) -> list[int]:
        """Ids of a text as the model is used to read it: what its makers put in front of a text and behind it
        included (`frame`), as transformers' tokenizers give it. Raises UserError as `encode`."""
        return [*self.frame.begin, *self.encode(text), *self.frame.close]

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
        return self.spelling.bytes_of(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that do not form UTF-8 become U+FFFD."""
        return self.spelling.decode(ids)

    def token_bytes(self, number: int) -> bytes:
        """The bytes of one token; a piece that begins a word begins with a space."""
        return self.spelling.data[number]

    def name(self, number: int) -> str:
        """A token as the vocabulary spells it, for people to look at."""
        return str(self.backend.id_to_token(number) or f"[no token {number}]")

    @cached_property
    def spelling(self) -> Spelling:
        """What each token stands for."""
        return Spelling(
            self.backend.get_vocab(with_added_tokens=True),
            self.vocab_size,
            nothing=self.control_ids.values(),
            added=self.backend.get_added_tokens_decoder(),
            decoding=self._decoding,
        )

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The backend for texts that go on: without the space that some put in front of a text."""
        content = without_prefix(_parts_of(self.backend))
        if content is None:
            return self.backend
        whole = json.loads(self.to_json()) | content
        with library("the tokenizer fails"):
            backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
        backend.encode_special_tokens = True
        return backend

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
        return self.spelling.byte_ids(self.backend.get_vocab(with_added_tokens=True))


def _parts_of(backend: tokenizers.Tokenizer) -> dict[str, object]:
    """The parts of a tokenizer, but for its model and its tokens, as tokenizer.json has them."""
    bare = tokenizers.Tokenizer(models.BPE())
    for place in PARTS:
        part = getattr(backend, place)
        if part is not None:
            setattr(bare, place, part)
    content = json.loads(bare.to_str())
    return {place: content.get(place) for place in PARTS}


PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


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
    """Text from ids that come one by one; a character is given out once all its bytes have come.

    All pieces together are what `Tokenizer.decode` gives. `continues` says that the ids go on in the middle
    of a text: a space that the first one begins with then counts.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._decoder = tokenizer.spelling.decoder(continues=continues)

    def push(self, number: int) -> str:
        """The text that this id completes; may be empty."""
        return self._decoder.push(number)

    def flush(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._decoder.flush()

    def pending(self) -> str:
        """Whole characters that are held back, because the next id may yet make them none; it is what `flush`
        would give now."""
        return self._decoder.pending()
