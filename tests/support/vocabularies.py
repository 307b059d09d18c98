"""Small tokenizers of the kinds that models have: SentencePiece's, with what each family puts around it, and
byte-level ones with a post-processor."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "Hello there, how are you today?",
    "I am fine, thank you.  And you?",
    "the theory of the other: there they are, these three",
    "naïve café — 東京",
    "don't stop!\n\nnot  now",
    "def f(x):\n    return x + 1",
] * 4
SPACE = "▁"
TEXTS = (
    "Hello there",
    " Hello",
    "  two spaces",
    "",
    " ",
    "the\nother\n\n",
    "naïve café — 東京 🙂 עברית",
    "tab\there",
    "thethethethe there",
    "a▁b",
    "<s> is text, and <0x41> too",
    "\x00\x7f",
    "return x +   1",
)
"""Texts with spaces, line ends, scripts and signs; some with what no token of the vocabulary holds."""


def sentencepiece(
    kind: str = "llama", *, size: int = 120, extra: tuple[str, ...] = (), texts: list[str] = LINES
) -> tokenizers.Tokenizer:
    """A vocabulary with `<unk>`, `<s>`, `</s>`, 256 byte tokens, `extra` control tokens and pieces learnt on
    `texts`.

    kind: `llama` (as in Llama 2 and Phi-3: normalisers that put a sign in front), `gemma` (none in front),
    `first`, `always` or `never` (pre-tokenizer Metaspace, as in Mistral), `unigram`.
    """
    pieces, merges = _learnt(texts, size)
    names = ["<unk>", "<s>", "</s>", *extra, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: number for number, token in enumerate([*names, *pieces])}
    if kind == "unigram":
        scores = [(token, 0.0 if token in names else -float(number)) for token, number in vocab.items()]
        backend = tokenizers.Tokenizer(models.Unigram(scores, 0, True))
    else:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
    spaces = normalizers.Replace(" ", SPACE)
    strip: list[Any] = [decoders.Strip(" ", 1, 0)]
    if kind == "gemma":
        backend.normalizer, strip = spaces, []
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        scheme: Any = "always" if kind == "unigram" else kind
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        strip = [] if kind == "never" else strip
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *extra]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def _learnt(texts: list[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges, such that every way to make a piece of two others is a merge, as SentencePiece's
    are."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    content = json.loads(backend.to_str())["model"]
    known = sorted(content["vocab"], key=content["vocab"].__getitem__)
    merges = [
        (piece[:at], piece[at:])
        for piece in known
        for at in range(1, len(piece))
        if piece[:at] in content["vocab"] and piece[at:] in content["vocab"]
    ]
    return known, merges


KINDS = ("llama", "gemma", "first", "always", "never")


def byte_level(
    specials: tuple[str, ...] = ("<|begin|>", "<|end_of_text|>"), *, size: int = 340
) -> tokenizers.Tokenizer:
    """A byte-level BPE, cut as Llama 3's."""
    from chatwright.interop.gguf_tokenizer import PRE_TOKENIZERS

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["llama-bpe"]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(one, special=True, normalized=False) for one in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return backend
