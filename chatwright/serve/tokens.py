"""An answer's tokens as texts with probabilities, for people to look at."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from chatwright.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from chatwright.generate.request import Alternatives, Piece

Token = dict[str, Any]
"""{"text", "p", "alternatives": [{"text", "p"}, ...]}; p is None where it is not known."""


class TokenTexts:
    """Pieces in, tokens out; the tokens' texts, joined, are the pieces' text.

    A token that ends within a character waits for the rest of it, and both are given out as one, with the
    product of their probabilities and the alternatives to the first. Tokens also wait for the text of their
    piece: it comes later where it might begin a stop text, and never where it does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._waiting: deque[Token] = deque()
        self._unfinished: Token | None = None
        self._said = 0
        """Characters of the pieces that no token given out accounts for."""

    def push(self, piece: Piece) -> list[Token]:
        """The tokens that `piece` sets free. Its request must have asked for alternatives
        (`top_logprobs`)."""
        for token, logprob, top in zip(piece.ids, piece.logprobs, piece.top_logprobs, strict=True):
            text = self._stream.push(token) if token < self._tokenizer.vocab_size else ""
            self._take(token, text, math.exp(logprob), top)
        self._said += len(piece.text)
        final = piece.finish_reason is not None
        if final and (rest := self._stream.flush()):
            self._unfinished = self._unfinished or {"p": math.nan, "alternatives": []}
            self._finish(rest)
        return self._release(final=final)

    def _take(self, token: int, text: str, p: float, top: Alternatives) -> None:
        if token >= self._tokenizer.vocab_size or not self._tokenizer.token_bytes(token):
            return  # a control token: it is not part of the text
        if self._unfinished is None:
            alternatives = [
                {"text": spelled(self._tokenizer, number), "p": _share(math.exp(value))}
                for number, value in top
            ]
            self._unfinished = {"p": p, "alternatives": alternatives}
        else:
            self._unfinished["p"] *= p
        if text:
            self._finish(text)

    def _finish(self, text: str) -> None:
        assert self._unfinished is not None
        self._waiting.append({**self._unfinished, "text": text, "p": _share(self._unfinished["p"])})
        self._unfinished = None

    def _release(self, *, final: bool) -> list[Token]:
        free: list[Token] = []
        while self._waiting and len(self._waiting[0]["text"]) <= self._said:
            free.append(self._waiting.popleft())
            self._said -= len(free[-1]["text"])
        if final and self._waiting and self._said:  # a stop text cuts this token
            free.append({**self._waiting[0], "text": self._waiting[0]["text"][: self._said]})
        return free


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: what it spells, the name of a control token, bytes that are no text as \\xNN."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"  # a place in the model's table that no token has
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.name(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def _share(p: float) -> float | None:
    """Four digits are enough to look at, and keep the store small."""
    return None if math.isnan(p) else float(f"{p:.4g}")
