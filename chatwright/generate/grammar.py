"""Structured output: answers that match JSON, a JSON schema, a regular expression or calls of tools.

Before a token is chosen, all tokens that the grammar does not allow next are masked (Willard & Louf 2023,
arXiv:2307.09702). The engine knows two protocols, Grammar and Matcher. They are implemented here with
llguidance (Microsoft, MIT): derivatives of regular expressions below an Earley parser, walked along a trie of
the vocabulary's bytes.

llguidance sees a token as its bytes. Control tokens have none here, so that no grammar can allow one. End
tokens are handled here; for llguidance a single token beyond the vocabulary stands for all of them. White
space between the parts of JSON is bounded, for small models often repeat it for ever.

A schema's worst case is bounded in time and memory (schemas.py, LIMITS); nothing is fetched.

Figures (`python benchmarks/constrain.py`: SmolLM2's 49,152 tokens, one of two cores that others use as well):
a mask takes 0.03 ms (median; 0.1 to 0.2 on average), a schema 2 to 20 ms to compile, a vocabulary 0.7 s once.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chatwright.config import UserError
from chatwright.generate.schemas import LONGEST_PATTERN, check_schema
from chatwright.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

WHITE_SPACE = r"\n? {0,16}"
"""White space that may stand between the parts of JSON: a line end, an indentation."""
LIMITS = {
    "max_items_in_row": 20_000,  # each optional property of an object has four
    "initial_lexer_fuel": 1_000_000,  # compiling: 20 ms
    "step_lexer_fuel": 200_000,  # a mask: 15 ms
    "step_max_items": 50_000,  # a mask: 3 ms
    "max_lexer_states": 20_000,  # 2 kB each
    "max_grammar_size": 500_000,
}
"""llguidance's limits for each sequence, with the times that it documents. Beyond them that sequence alone
fails."""
LONGEST_CHOICES = 1 << 14
"""Most characters of all texts of a choice."""
REMEMBERED = 32
"""Compiled grammars that are kept per tokenizer."""


class Matcher(Protocol):
    """The state of one answer in its grammar."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but its end could follow."""
        ...

    def allow(self, mask: NDArray[np.bool_]) -> None:
        """Set every element of `mask`, (vocab,): True for tokens that may come next. The model's vocabulary
        may be larger than the tokenizer's. Raises UserError when no token may."""
        ...

    def accept(self, token: int) -> None:
        """Advance by a token that was allowed."""
        ...


class Grammar(Protocol):
    """The form that an answer must have. Immutable: many requests may share one, from any thread."""

    def start(self) -> Matcher:
        """A new matcher, for one answer."""
        ...


def json_object(tokenizer: Tokenizer, end_ids: Iterable[int]) -> Grammar:
    """Any JSON object. `end_ids` end the answer once it is complete. Raises UserError without llguidance."""
    return json_schema(tokenizer, end_ids, {"type": "object"})


def json_schema(tokenizer: Tokenizer, end_ids: Iterable[int], schema: dict[str, Any]) -> Grammar:
    """JSON that satisfies a schema (its properties in the schema's order).

    Raises UserError when the schema is wrong, beyond the limits, not supported, or satisfied by nothing.
    """
    what = "the JSON schema"
    return lark(tokenizer, end_ids, f"start: {json_rule(check_schema(schema, what))}", what=what)


def json_rule(schema: dict[str, Any]) -> str:
    """The right side of a lark rule for JSON that satisfies a checked schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}"


def regex(tokenizer: Tokenizer, end_ids: Iterable[int], pattern: str) -> Grammar:
    """A text that a regular expression matches from end to end (Rust's syntax, without look-around).

    Raises UserError when the expression is wrong, or too long or too complex.
    """
    what = f"the regular expression {pattern!r:.80}"
    if len(pattern) > LONGEST_PATTERN:
        raise UserError(f"{what} has {len(pattern):,} characters; at most {LONGEST_PATTERN} are read")
    return lark(tokenizer, end_ids, llguidance().LLMatcher.grammar_from_regex(pattern), what=what)


def one_of(tokenizer: Tokenizer, end_ids: Iterable[int], choices: Sequence[str]) -> Grammar:
    """One of the given texts. Raises UserError when there are none, or an empty one, or they are too long."""
    what = "the choice"
    size = sum(map(len, choices))
    if not choices or not all(choices):
        raise UserError(f"{what} needs texts to choose from, none of them empty")
    if size > LONGEST_CHOICES:
        raise UserError(f"{what} has {size:,} characters altogether; at most {LONGEST_CHOICES:,} are read")
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)
    return lark(tokenizer, end_ids, f"start: {texts}", what=what)


def lark(tokenizer: Tokenizer, end_ids: Iterable[int], rules: str, *, what: str = "the grammar") -> Grammar:
    """A grammar in llguidance's dialect of Lark. Not for untrusted rules: only schemas are bounded
    (`check_schema`).

    Raises UserError, which begins with `what`, when the grammar is wrong or nothing satisfies it.
    """
    ends = np.array(sorted(set(end_ids)), dtype=np.int64)
    if not len(ends) or ends[0] < 0 or ends[-1] >= tokenizer.vocab_size:
        raise UserError(f"a grammar needs ids that end the answer, from 0 to {tokenizer.vocab_size - 1}")
    vocabulary = _vocabulary(tokenizer)
    return _LLGrammar(vocabulary, vocabulary.compile(rules, what), ends)


def llguidance() -> Any:
    """The library, imported when it is first needed. Raises UserError when it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UserError("llguidance is not installed; run: pip install 'chatwright[serve]'") from None
    return llguidance


# ---- llguidance --------------------------------------------------------------------------------------------


class _Vocabulary:
    """A tokenizer as llguidance sees it, and the grammars that were compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = llguidance()
        self.size = tokenizer.vocab_size
        controls = set(tokenizer.control_ids.values())
        pieces = [b"" if number in controls else tokenizer.token_bytes(number) for number in range(self.size)]
        # 0xff begins llguidance's names of special tokens. UTF-8 never has that byte, so no text needs a
        # token with it.
        self.tokens = [b"" if b"\xff" in piece else piece for piece in pieces] + [b"\xffend"]
        self.bos_token_id, self.eos_token_id, self.special_token_ids = None, self.size, [self.size]
        # Weak: `_VOCABULARIES` keeps this object as long as the tokenizer lives, and must not prolong that.
        self._tokenizer = weakref.ref(tokenizer)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._library = library
        self._wrapped = library.LLTokenizer(library.TokenizerWrapper(self))

    def __call__(self, text: bytes | str) -> list[int]:
        """The ids for a text that the grammar forces. llguidance calls this: it must not raise."""
        tokenizer = self._tokenizer()
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        try:
            ids = tokenizer.encode(data) if tokenizer is not None else []
        except UserError:  # a byte that no token has
            ids = []
        return ids if b"".join(self.tokens[number] for number in ids) == data else self._spell(data)

    def _spell(self, data: bytes) -> list[int]:
        """Spell the bytes by the longest tokens, up to a byte that no token has. For texts that the tokenizer
        changes (a normaliser) or cannot encode."""
        ids: list[int] = []
        at = 0
        while at < len(data):
            found = (
                self._ids.get(data[at : at + size])
                for size in range(min(self._longest, len(data) - at), 0, -1)
            )
            number = next((number for number in found if number is not None), None)
            if number is None:
                break
            ids.append(number)
            at += len(self.tokens[number])
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: number for number, piece in enumerate(self.tokens[: self.size]) if piece}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens))

    def compile(self, rules: str, what: str) -> LLMatcher:
        """A matcher at the grammar's beginning, to be copied."""
        with self._lock:
            found = self._compiled.get(rules)
            if found is not None:
                self._compiled.move_to_end(rules)
                return found
        limits = self._library.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher: LLMatcher = self._library.LLMatcher(self._wrapped, rules, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(f"{what} cannot be used: {_reason(matcher)}")
        first = matcher.deep_copy()
        if not any(first.compute_bitmask()) or first.is_error():
            raise UserError(
                f"{what} cannot be satisfied by any answer ({_reason(first) or 'it begins with nothing'})"
            )
        with self._lock:
            self._compiled[rules] = matcher
            while len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return matcher

    def copy(self, matcher: LLMatcher) -> LLMatcher:
        with self._lock:
            return matcher.deep_copy()


_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """The vocabulary of a tokenizer. It is made once, since that takes a pass over all tokens."""
    with _LOCK:
        found = _VOCABULARIES.get(tokenizer)
        if found is None:
            found = _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
        return found


def _reason(matcher: LLMatcher) -> str:
    """llguidance's error in one line, without its position. A regular expression's error is a drawing, of
    which the line with `error:` counts."""
    lines = [
        line.strip()
        for line in matcher.get_error().replace("<non-verbose/>", "").splitlines()
        if line.strip()
    ]
    said = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    if said.startswith("NoExtensionBias"):
        return "no token of this vocabulary can come next"
    said = re.sub(r"^(error: |at \d+\(\d+\): |failed to compile JSON schema: )+", "", said)
    return said if len(said) <= 300 else said[:300] + "..."


class _LLGrammar:
    """A compiled grammar."""

    def __init__(self, vocabulary: _Vocabulary, compiled: LLMatcher, ends: NDArray[np.int64]) -> None:
        self._vocabulary, self._compiled, self._ends = vocabulary, compiled, ends

    def start(self) -> Matcher:
        return _LLMatcher(self._vocabulary.copy(self._compiled), self._vocabulary.size, self._ends)


class _LLMatcher:
    """A matcher by llguidance. `size` is the tokenizer's vocabulary size; the bit after it stands for the
    end."""

    def __init__(self, matcher: LLMatcher, size: int, ends: NDArray[np.int64]) -> None:
        self._matcher, self._size, self._ends = matcher, size, ends
        self._ended = False
        self._bits = np.zeros(size // 32 + 1, dtype=np.uint32)

    @property
    def finished(self) -> bool:
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def allow(self, mask: NDArray[np.bool_]) -> None:
        matcher, size = self._matcher, self._size
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if matcher.is_error():
            raise UserError(f"the answer cannot go on as its grammar asks: {_reason(matcher)}")
        bits = np.unpackbits(self._bits.view(np.uint8), count=size + 1, bitorder="little")
        mask[:size] = bits[:size]
        mask[size:] = False
        mask[self._ends] = bits[size]  # an end token that is also text ends the answer anywhere
        if not mask.any():
            raise UserError(
                "the answer cannot go on as its grammar asks: no token of this vocabulary can come next"
            )

    def accept(self, token: int) -> None:
        if token in self._ends:
            self._ended = True
        else:
            self._matcher.consume_token(token)  # the next `allow` reports an error
