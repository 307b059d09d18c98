"""SentencePiece's vocabularies in GGUF: llama.cpp, our reader and the tokenizer that was written give the
same ids, and begin and end alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from chatwright.config import UserError
from chatwright.interop import gguf_tokenizer as reading
from chatwright.interop.gguf import load_gguf
from chatwright.interop.gguf_export import plan_gguf
from chatwright.interop.gguf_tokenizer_export import pre_name, vocabulary
from chatwright.interop.loaded import Loaded
from chatwright.interop.spm import merges_of, scores_of
from chatwright.interop.templates import chat_template
from chatwright.tokenizer import Tokenizer
from support.vocabularies import LINES, TEXTS, byte_level, sentencepiece

from .conftest import SHAPES, random_model

try:
    import llama_cpp
except ImportError:
    llama_cpp = None  # type: ignore[assignment]

needs_llama_cpp = pytest.mark.skipif(
    llama_cpp is None,
    reason="llama-cpp-python is not installed: what llama.cpp makes of these vocabularies is NOT covered",
)
WRITTEN = ("llama", "gemma", "always", "first", "never")


def framed(backend: Backend, single: str = "<s> $A") -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return Tokenizer(backend, end_of_text="</s>")


def parts(tokenizer: Tokenizer, template: str | None = None) -> Loaded:
    shape = replace(SHAPES["llama"], vocab_size=tokenizer.vocab_size + 5)
    made = chat_template(template, begin="<s>", end="</s>") if template else None
    return Loaded(random_model(shape), tokenizer, made, "x")


def written(found: Loaded, file: Path) -> Path:
    plan_gguf(found).write(file)
    return file


@contextmanager
def vocabulary_of(file: Path) -> Iterator[Any]:
    with closing(llama_cpp.Llama(str(file), vocab_only=True, verbose=False)) as model:
        yield model


@pytest.mark.parametrize("kind", WRITTEN)
def test_read_back_by_us(kind: str, tmp_path: Path) -> None:
    tokenizer = framed(sentencepiece(kind))
    again = load_gguf(written(parts(tokenizer), tmp_path / "m.gguf")).tokenizer
    assert again is not None
    for text in TEXTS:
        if text.startswith(" ") and kind in ("always", "first"):
            continue  # llama.cpp puts one more space there, and the export says so
        assert again.encode_text(text) == tokenizer.encode_text(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.end_ids == tokenizer.end_ids and again.frame.begin == (1,)
    assert again.encode(b"\xff") == tokenizer.encode(b"\xff")
    assert not again.known[again.vocab_size - 1 :].all() or again.vocab_size == tokenizer.vocab_size


@pytest.fixture(scope="module", params=("llama", "gemma"))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """llama.cpp and us, with the same file."""
    if llama_cpp is None:
        pytest.skip("llama-cpp-python is not installed: what llama.cpp makes of these is NOT covered")
    file = tmp_path_factory.mktemp("spm") / "m.gguf"
    tokenizer = framed(sentencepiece(request.param, size=200))
    again = load_gguf(written(parts(tokenizer), file)).tokenizer
    with vocabulary_of(file) as theirs:
        yield theirs, again, tokenizer


def same(both: Any, text: str) -> None:
    theirs, again, tokenizer = both
    expected = tokenizer.encode_text(text)
    assert again.encode_text(text) == expected
    assert theirs.tokenize(text.encode(), add_bos=True, special=False) == expected


@pytest.mark.parametrize("text", [*TEXTS, *LINES[:6], " ".join(LINES)])
def test_llama_cpp_gets_the_same_ids(both: Any, text: str) -> None:
    same(both, text)


WORDS = st.sampled_from(
    ["the", "re", "th", "e", "o", "ther", " ", "  ", "\n", "東", "🙂", "é", "s", "a", "▁"]
)


@settings(max_examples=300)
@given(text=st.lists(WORDS, max_size=12).map("".join))
def test_llama_cpp_gets_the_same_ids_of_any_text(both: Any, text: str) -> None:
    same(both, text)


@needs_llama_cpp
def test_llama_cpp_ends_where_we_do(tmp_path: Path) -> None:
    tokenizer = framed(sentencepiece("llama", extra=("<turn>", "<stop>")))
    turn, stop = (tokenizer.control_ids[name] for name in ("<turn>", "<stop>"))
    tokenizer = tokenizer.framed(tokenizer.frame.with_ends([turn, stop], "generation_config.json"))
    file = written(parts(tokenizer), tmp_path / "m.gguf")
    with vocabulary_of(file) as theirs:
        raw = theirs._model.vocab
        ends = {one for one in range(theirs.n_vocab()) if llama_cpp.llama_vocab_is_eog(raw, one)}
        assert ends == tokenizer.end_ids == {2, turn, stop}
    again = load_gguf(file).tokenizer
    assert again is not None and again.end_ids == ends


BESIDE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"


@needs_llama_cpp
@pytest.mark.parametrize("begins", [True, False])
def test_conversations_go_before_texts(begins: bool, tmp_path: Path) -> None:
    """llama.cpp has one switch for both. Where conversations begin otherwise, it is off, and a note says so;
    we know what stands in front of a text all the same."""
    tokenizer = framed(sentencepiece("llama"))
    plan = plan_gguf(parts(tokenizer, ("<s>" if begins else "") + BESIDE))
    plan.write(tmp_path / "m.gguf")
    with vocabulary_of(tmp_path / "m.gguf") as theirs:
        assert bool(llama_cpp.llama_vocab_get_add_bos(theirs._model.vocab)) is begins
    assert any("its conversations do not" in note for note in plan.notes) is not begins
    again = load_gguf(tmp_path / "m.gguf").tokenizer
    assert again is not None and again.encode_text("Hello") == tokenizer.encode_text("Hello")


def changed(backend: Backend, **model: Any) -> Tokenizer:
    content = json.loads(backend.to_str())
    content["model"] |= model
    return Tokenizer(Backend.from_str(json.dumps(content)), end_of_text="</s>")


def test_what_llama_cpp_would_join_otherwise_is_refused() -> None:
    """It knows no merges: what is a token, it joins."""
    content = json.loads(sentencepiece("llama").to_str())["model"]
    assert ["t", "h"] in content["merges"] and "th" in content["vocab"]
    merges = [pair for pair in content["merges"] if "".join(pair) != "th"]
    with pytest.raises(UserError, match=r"never joins .t. and .h. to its token .th., and llama\.cpp"):
        vocabulary(changed(sentencepiece("llama"), merges=merges), 400)


def test_other_treatment_of_text_is_refused() -> None:
    with pytest.raises(UserError, match="no token for each single byte"):
        vocabulary(changed(sentencepiece("llama"), byte_fallback=False), 400)
    with pytest.raises(UserError, match="of type Unigram, and only BPE can be written"):
        vocabulary(framed(sentencepiece("unigram")), 400)
    cut = sentencepiece("always")
    cut.pre_tokenizer.split = True  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"cuts text at spaces \(Metaspace, split\)"):
        vocabulary(framed(cut), 400)


def test_scores_and_merges_are_each_others_inverse() -> None:
    """Also where a piece could be made in several ways, of which one comes about."""
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("t", "he"), ("the", "the")]
    pieces = ["t", "h", "e", "th", "he", "the", "thethe"]
    scores = scores_of(pieces, merges)
    assert scores["th"] > scores["he"] > scores["the"] > scores["thethe"]
    assert merges_of(scores) == [("t", "h"), ("h", "e"), ("th", "e"), ("the", "the")]


def test_pieces_that_nobody_could_join_in_time_are_refused() -> None:
    with pytest.raises(UserError, match="too long for a vocabulary"):
        merges_of({"x" * 30_000: 0.0})


def metadata(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1]
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": [0.0] * 259 + [-2.0, -3.0, -1.0],
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_where_a_file_says_nothing_llama_cpps_rules_hold() -> None:
    """SentencePiece's vocabularies begin with token 1 and end with token 2."""
    found = reading.read_tokenizer(metadata(), "m.gguf")
    assert found is not None
    assert found.frame.begin == (1,) and found.end_ids == {2}
    assert found.encode_text("a") == [1, found.backend.token_to_id("▁a")]
    off = reading.read_tokenizer(metadata(add_bos_token=False, add_space_prefix=False), "m.gguf")
    assert off is not None and off.encode_text("a") == [off.backend.token_to_id("a")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "its tokens' scores are damaged"),
        ({"scores": [float("nan")] * 262}, "its tokens' scores are damaged"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1, neither true nor false"),
        ({"bos_token_id": 999}, "tokenizer.ggml.bos_token_id is 999, not one of its tokens"),
        ({"model": "bert"}, "its tokenizer is of kind 'bert'; only byte-level BPE"),
    ],
)
def test_damage_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reading.read_tokenizer(metadata(**changes), "m.gguf")


def byte_values(pre: str, **more: Any) -> dict[str, Any]:
    content = json.loads(byte_level().to_str())
    vocab = content["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": [" ".join(one) for one in content["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("pre", reading.PRE_TOKENIZERS)
def test_byte_level_vocabularies_begin_as_llama_cpp_says(pre: str) -> None:
    usual = reading.read_tokenizer(byte_values(pre), "m.gguf")
    given = reading.read_tokenizer(byte_values(pre, add_bos_token=pre not in reading.BEGINS), "m.gguf")
    assert usual is not None and given is not None
    assert usual.frame.begin == ((0,) if pre in reading.BEGINS else ())
    assert given.frame.begin == (() if pre in reading.BEGINS else (0,))
    assert usual.end_ids == {1}
    assert reading.PRE_TOKENIZERS[pre_name(usual)] is reading.PRE_TOKENIZERS[pre]
