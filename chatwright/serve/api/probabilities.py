"""Log-probabilities of tokens in the two shapes of OpenAI's interface: one for chat, one for completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chatwright.generate.request import Alternatives, Piece
from chatwright.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class TokenProbability:
    """One token of an answer."""

    token: int
    logprob: float | None
    """None for the first token of a text, which has no context."""
    top: Alternatives


def token_probabilities(piece: Piece, end_ids: frozenset[int]) -> Iterator[TokenProbability]:
    """The tokens of a piece, without those of `end_ids`, which have no text."""
    tops: Sequence[Alternatives] = piece.top_logprobs or [[]] * len(piece.ids)
    for token, logprob, top in zip(piece.ids, piece.logprobs, tops, strict=True):
        if token not in end_ids:
            yield TokenProbability(token, logprob, top)


class Spelling:
    """Writes tokens in these shapes: as bytes, and as text, where an incomplete character becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = {number: name for name, number in tokenizer.control_ids.items()}

    def data(self, token: int) -> bytes:
        """A token's bytes; a control token's name; nothing for the padding rows of the embedding table."""
        if token in self._names:
            return self._names[token].encode()
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""

    def text(self, token: int) -> str:
        """A token as text."""
        return self.data(token).decode("utf-8", errors="replace")

    def chat(self, tokens: Sequence[TokenProbability], top: int) -> dict[str, Any]:
        """`logprobs` of a chat completion's choice: `content` has an entry per token, with `top` alternatives
        each."""
        entries = []
        for one in tokens:
            entry = self._entry(one.token, one.logprob)
            entries.append(entry | {"top_logprobs": [self._entry(*pair) for pair in one.top[:top]]})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.data(token)
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }

    def completion(self, tokens: Sequence[TokenProbability], top: int, offsets: Offsets) -> dict[str, Any]:
        """`logprobs` of a completion's choice; `offsets` counts the characters of its text."""
        return {
            "tokens": [self.text(one.token) for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [self._likeliest(one, top) for one in tokens] if top else None,
            "text_offset": [offsets.next(one.token) for one in tokens],
        }

    def _likeliest(self, one: TokenProbability, top: int) -> dict[str, float | None] | None:
        """Text -> log-probability, the chosen token included, as with OpenAI. Of tokens with equal texts the
        likeliest counts."""
        if one.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in [*one.top[:top], (one.token, one.logprob)]:
            found.setdefault(self.text(token), _finite(logprob))
        return found


class Offsets:
    """Where the tokens of a text begin in it, in characters. A token within a character begins where that one
    does; a control token has no characters."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling, self._stream, self._at = spelling, TextStream(spelling.tokenizer), 0

    def next(self, token: int) -> int:
        """Where the text's next token begins."""
        begun = self._at
        if token < self._spelling.tokenizer.vocab_size:
            self._at += len(self._stream.push(token))
        return begun


def _finite(logprob: float | None) -> float | None:
    """At least -9999, which OpenAI writes for impossible tokens: JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)
