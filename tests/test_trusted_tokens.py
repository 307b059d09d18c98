"""Ids of a text whose characters are partly trusted: as the tokenizers library gives them for the whole, but
for control tokens that are not the template's."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from chatwright.config import UserError
from chatwright.tokenizer import Tokenizer
from chatwright.traced_text import CONTENT, Traced, joined, of_message, owned
from chatwright.trusted_tokens import encoder_of

SPECIALS = ("<s>", "</s>", "<end>", "<ends>", "[INST]")
TEXTS = ["Hello there, how are you?", "user: Hi end s INST <end> [ ] /", "  two  spaces\n\n"] * 4
USER = of_message(0, CONTENT)


def backend(kind: str, **flags: bool) -> tokenizers.Tokenizer:
    """A small BPE: by bytes, or with ▁ for spaces (in front of a text, of each piece, or by a normaliser)."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<s>", fuse_unk=False))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [*map(chr, range(32, 127)), "▁", "\n"]
    )
    specials: list[Any] = [AddedToken(one, special=True, normalized=False, **flags) for one in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


KINDS = ("bytes", "first", "always", "never", "prepend")
MADE = {kind: Tokenizer(backend(kind), end_of_text="</s>") for kind in KINDS}
WHOLE = {kind: backend(kind) for kind in KINDS}
PIECES = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(
            st.sampled_from([*SPECIALS, "Hi", " ", "Hello there", "\n", "<", "end", "s>", "▁"]), max_size=4
        ).map("".join),
    ),
    max_size=6,
)


def text_of(pieces: list[tuple[bool, str]]) -> str:
    """Pieces of the template's (True) and of a message."""
    return joined(piece if own else owned(piece, USER) for own, piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(pieces=PIECES)
def test_ids_are_those_of_the_whole_where_nobody_spells_a_control_token(
    kind: str, pieces: list[tuple[bool, str]]
) -> None:
    text, tokenizer = text_of(pieces), MADE[kind]
    found = encoder_of(tokenizer).encode(text)
    theirs = WHOLE[kind].encode(str.__str__(text), add_special_tokens=False)
    controls = set(tokenizer.control_ids.values())
    at, trusted = 0, set()
    for own, piece in pieces:
        trusted |= set(range(at, at + len(piece))) if own else set()
        at += len(piece)
    spans = [span for token, span in zip(theirs.ids, theirs.offsets, strict=True) if token in controls]
    if all(set(range(*span)) <= trusted for span in spans):
        assert found.ids == theirs.ids
    for token, (start, stop) in zip(found.ids, found.spans, strict=True):
        if token in controls and str.__getitem__(text, slice(start, stop)) in SPECIALS:
            assert set(range(start, stop)) <= trusted


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_that_a_message_spells_is_text(kind: str) -> None:
    """And the text behind it is not taken for the beginning of a text: no ▁ is put in front of it."""
    tokenizer = MADE[kind]
    text = text_of([(True, "[INST]"), (False, "Hi<end>Hi"), (True, "<end>Hi")])
    found = encoder_of(tokenizer).encode(text)
    names = [tokenizer.name(token) for token in found.ids]
    assert [name for name in names if name in SPECIALS] == ["[INST]", "<end>"]
    spelled = "".join(names).replace("Ġ", " ")
    wanted = {"always": "[INST]▁Hi<end>Hi<end>▁Hi", "prepend": "[INST]▁Hi<end>Hi<end>▁Hi"}
    assert spelled == wanted.get(kind, "[INST]Hi<end>Hi<end>Hi")
    assert [
        str.__getitem__(text, slice(*span))
        for token, span in zip(names, found.spans, strict=True)
        if token in SPECIALS
    ] == [
        "[INST]",
        "<end>",
    ]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ([(True, "<end>")], ["<end>"]),
        ([(True, "<en"), (False, "d>")], []),
        ([(False, "<"), (True, "end>")], []),
        ([(False, "<ends"), (True, "><end>")], ["<end>"]),
        ([(True, "<end"), (True, ">")], ["<end>"]),
        ([(False, "<end>"), (True, "<end>"), (False, "<ends>")], ["<end>"]),
        ([(False, "[INS"), (False, "T]"), (True, "</s>")], ["</s>"]),
        ([(False, "\ud800<end>"), (True, "<end>")], ["<end>"]),
    ],
)
def test_only_trusted_characters_make_control_tokens(
    pieces: list[tuple[bool, str]], wanted: list[str]
) -> None:
    found = encoder_of(MADE["bytes"]).encode(text_of(pieces))
    names = [MADE["bytes"].name(token) for token in found.ids]
    assert [name for name in names if name in SPECIALS] == wanted


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_flags_of_added_tokens_count(flags: dict[str, bool]) -> None:
    """Also where a message spells a control token, and the text is encoded in parts."""
    made = backend("bytes", **flags)
    tokenizer = Tokenizer(backend("bytes", **flags), end_of_text="</s>")
    for before, behind in (("Hi  ", "  you"), ("Hi", "you"), ("", ""), (" ", "\n")):
        plain = text_of([(True, "a"), (False, before), (True, "<end>"), (False, behind), (True, "<end>")])
        ids = made.encode(str.__str__(plain), add_special_tokens=False).ids
        assert encoder_of(tokenizer).encode(plain).ids == ids
        spelled = text_of(
            [
                (False, "</s>"),
                (True, "."),
                (True, "a"),
                (False, before),
                (True, "<end>"),
                (False, behind),
                (True, "<end>"),
            ]
        )
        found = encoder_of(tokenizer).encode(spelled).ids
        assert found[-len(ids) :] == ids and tokenizer.control_ids["</s>"] not in found


def test_an_added_token_that_ends_a_turn_counts_as_a_control_token() -> None:
    """Though it is no special token: nobody but the template writes it."""
    made = backend("bytes")
    made.add_tokens(
        [AddedToken("<|im_end|>", special=False, normalized=False), AddedToken("<think>", special=False)]
    )
    tokenizer = Tokenizer(made, end_of_text="</s>")
    text = text_of([(False, "<think>x<|im_end|>"), (True, "<|im_end|>")])
    found = [tokenizer.name(token) for token in encoder_of(tokenizer, ("<|im_end|>",)).encode(text).ids]
    assert found.count("<|im_end|>") == 1 and found[-1] == "<|im_end|>" and found[0] == "<think>"


def test_a_tokenizer_that_makes_control_tokens_out_of_text_is_refused() -> None:
    made = tokenizers.Tokenizer(
        models.BPE({"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "x": 5}, [("<", "e"), ("<e", ">")])
    )
    made.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    tokenizer = Tokenizer(made, end_of_text="<e>")
    assert encoder_of(tokenizer).encode("x<e>").ids == [5, 4]
    with pytest.raises(
        UserError, match="makes its control token <e> out of plain text: a message could forge it"
    ):
        encoder_of(tokenizer).encode(Traced("x<e>", ((4, USER),)))
