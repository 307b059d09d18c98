"""A tokenizer in transformers' format: what a text becomes is what transformers makes of it, and all that its
makers call an end ends an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, models, processors

from chatwright.config import UserError
from chatwright.interop.hf import load_hf
from chatwright.interop.hf_tokenizer import read_tokenizer
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.tokenizer import Tokenizer
from support.vocabularies import KINDS, LINES, SPACE, TEXTS, byte_level, sentencepiece

from .conftest import SHAPES, parts_of

BEGIN, END = "<|begin|>", "<|end_of_text|>"


def directory(path: Path, backend: Any, settings: dict[str, Any], **files: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def ours_of(path: Path) -> Tokenizer:
    return read_tokenizer(
        path,
        json.loads((path / "tokenizer.json").read_text()),
        json.loads((path / "tokenizer_config.json").read_text()),
    )


def theirs_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "begin": {"add_bos_token": True},
    "no begin": {"add_bos_token": False},
    "end": {"add_eos_token": True},
    "both": {"add_bos_token": True, "add_eos_token": True},
    "begin without a token": {"add_bos_token": True, "bos_token": None},
    "as an object": {"add_bos_token": True, "bos_token": {"content": BEGIN, "__type": "AddedToken"}},
}


@pytest.mark.parametrize("template", [None, "$A", f"{BEGIN} $A", f"{BEGIN} $A {END}"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_text_begins_as_in_transformers(name: str, template: str | None, tmp_path: Path) -> None:
    backend = byte_level()
    if template:
        tokens = [(BEGIN, 0), (END, 1)]
        backend.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=tokens
        )
    path = directory(tmp_path, backend, {"bos_token": BEGIN, "eos_token": END, **SETTINGS[name]})
    ours, theirs = ours_of(path), theirs_of(path)
    begins = bool(SETTINGS[name].get("add_bos_token")) and SETTINGS[name].get("bos_token", BEGIN) is not None
    ends = bool(SETTINGS[name].get("add_eos_token"))
    for text in ("Hello there", "", " 東京 🙂"):
        expected = theirs(text)["input_ids"]
        if template is None:  # transformers 5 does not look at the settings, others do
            expected = [0] * begins + expected + [1] * ends
        assert ours.encode_text(text) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_as_in_transformers(kind: str, text: str, tmp_path: Path) -> None:
    backend = sentencepiece(kind)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
    )
    path = directory(tmp_path, backend, {"bos_token": "<s>", "eos_token": "</s>"})
    ours, theirs = ours_of(path), theirs_of(path)
    if "<s>" not in text:  # there, typed control tokens are control tokens
        assert ours.encode_text(text) == theirs(text)["input_ids"]
    ids = ours.encode_text(text)
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_the_begin_token_of_an_older_directory(tmp_path: Path) -> None:
    """Its special tokens stand in a file of their own."""
    path = directory(tmp_path, byte_level(), {"add_bos_token": True})
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": BEGIN, "eos_token": END}))
    assert ours_of(path).frame.begin == (0,)


def test_all_ends_that_are_named(tmp_path: Path) -> None:
    backend = byte_level((BEGIN, END, "<|eot|>", "<|eom|>", "<|im_end|>"))
    path = directory(
        tmp_path,
        backend,
        {"bos_token": BEGIN, "eos_token": "<|eot|>"},
        generation_config={"eos_token_id": [1, 3, 9_999], "temperature": 0.6},
        config={"eos_token_id": 4},
    )
    ours = ours_of(path)
    assert ours.end_of_text == END
    assert ours.end_ids == {1, 2, 3, 4}
    assert dict(ours.frame.ends) == {
        2: "eos_token of tokenizer_config.json",
        1: "eos_token_id of generation_config.json",
        3: "eos_token_id of generation_config.json",
        9_999: "eos_token_id of generation_config.json",
        4: "eos_token_id of config.json",
    }


def test_what_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = directory(tmp_path, byte_level(), {"add_bos_token": True, "bos_token": "<nowhere>"})
    with pytest.raises(UserError, match=r"add_bos_token is on, and the tokenizer has no token '<nowhere>'"):
        ours_of(path)
    path = directory(tmp_path, byte_level(), {"add_bos_token": True, "bos_token": "\ud800"})
    with pytest.raises(UserError, match=r"the tokenizer has no token '.ud800'"):
        ours_of(path)
    path = directory(tmp_path, byte_level(), {}, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is </s>; it must be ids"):
        ours_of(path)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="it has no decoder, so that nobody knows"):
        ours_of(directory(tmp_path, backend, {"eos_token": END}))
    words = byte_level()
    words.model = models.WordLevel({"Hello": 0, END: 1}, unk_token=END)
    words.add_special_tokens([AddedToken(END, special=True)])
    with pytest.raises(UserError, match="is a tokenizer of kind WordLevel, not BPE"):
        ours_of(directory(tmp_path, words, {"eos_token": END}))
    pieces = sentencepiece("unigram")  # it would make `</s>` of text that spells it
    with pytest.raises(UserError, match="is a tokenizer of kind Unigram, not BPE"):
        ours_of(directory(tmp_path, pieces, {"eos_token": "</s>"}))


FRAMES = {
    "begin": f"{BEGIN} $A",
    "both": f"{BEGIN} $A {END}",
    "two": f"{BEGIN} {END} $A",
    "nothing": "$A",
}


@pytest.mark.parametrize("name", FRAMES)
def test_an_export_begins_alike(name: str, tmp_path: Path) -> None:
    """transformers and our reader give the text's ids; all ends are kept."""
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single=FRAMES[name], pair=None, special_tokens=[(BEGIN, 0), (END, 1)]
    )
    tokenizer = Tokenizer(backend, end_of_text=END)
    tokenizer = tokenizer.framed(tokenizer.frame.with_ends([5], "generation_config.json"))
    written(tokenizer, tmp_path)
    theirs, again = theirs_of(tmp_path), load_hf(tmp_path).tokenizer
    assert again is not None
    for text in ("Hello there", ""):
        assert theirs(text)["input_ids"] == tokenizer.encode_text(text) == again.encode_text(text)
    assert again.end_ids == tokenizer.end_ids == {1, 5}


def written(tokenizer: Tokenizer, path: Path) -> None:
    """The export of a base model with this tokenizer."""
    path.mkdir(exist_ok=True)
    from chatwright.interop.hf_export import plan_hf

    shape = replace(SHAPES["llama"], vocab_size=tokenizer.vocab_size + 3)
    trained_here = parts_of(shape, Tokenizer.train(LINES, 300))
    plan_hf(Loaded(trained_here.model, tokenizer, None, "x")).write(path)


def test_a_tokenizer_trained_here_begins_alike_when_exported(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(LINES, 300)
    written(tokenizer, tmp_path)
    text = "Hello there"
    expected = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    assert theirs_of(tmp_path)(text)["input_ids"] == expected
    again = load_hf(tmp_path).tokenizer
    assert again is not None and again.encode_text(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_through_import_and_export(kind: str, tmp_path: Path) -> None:
    """A directory of ours keeps what stands around a text, and gives the same texts and ids."""
    from chatwright.commands.import_ import write_model

    backend = sentencepiece(kind)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
    )
    tokenizer = Tokenizer(backend, end_of_text="</s>")
    written(tokenizer, tmp_path / "hf")
    write_model(load_hf(tmp_path / "hf"), tmp_path / "own", source="x")
    own = load_parts(tmp_path / "own").tokenizer
    assert own is not None
    for text in TEXTS:
        assert own.encode_text(text) == tokenizer.encode_text(text)
        assert own.decode(own.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert own.end_ids == tokenizer.end_ids and own.frame.begin == (1,)
    assert SPACE not in own.decode(own.encode("the other"))
