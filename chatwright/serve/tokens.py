"""An answer's tokens as texts with probabilities, for display."""

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
    """Turns pieces of an answer into tokens; the tokens' texts, joined, equal the pieces' text.

    A token that ends within a character is merged with the tokens that complete the character: the merged
    token has the product of their probabilities and the alternatives to the first. Tokens are held back until
    the engine gives out their text. The engine delays text that may begin a stop text, and drops it if it
    does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._waiting: deque[Token] = deque()
        self._unfinished: Token | None = None
        self._said = 0
        """Characters of the pieces that are not yet covered by released tokens."""

    def push(self, piece: Piece) -> list[Token]:
        """The tokens that `piece` completes. Its request must have asked for alternatives
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
    """A token as text: its characters, the name of a control token, or \\xNN for bytes that are not UTF-8."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"  # a row of the model's embedding table that belongs to no token
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.name(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def _share(p: float) -> float | None:
    """`p` rounded to four digits, which keeps the store small; None for NaN."""
    return None if math.isnan(p) else float(f"{p:.4g}")
