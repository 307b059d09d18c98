"""What stands around a text: as each kind of post-processor says, and as it was saved."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from chatwright.config import UserError
from chatwright.text_frame import TextFrame, of_post_processor, template_processing
from chatwright.tokenizer import Tokenizer
from support.vocabularies import byte_level

BEGIN, END = "<|begin|>", "<|end_of_text|>"
SINGLE = {
    "begin": f"{BEGIN} $A",
    "both": f"{BEGIN} $A {END}",
    "end": f"$A {END}",
    "twice": f"{BEGIN} {END} $A",
}
PAIRS = [(BEGIN, 0), (END, 1)]


def post_processors() -> dict[str, Any]:
    template = {
        name: processors.TemplateProcessing(single=single, pair=None, special_tokens=PAIRS)
        for name, single in SINGLE.items()
    }
    level = processors.ByteLevel(trim_offsets=False)
    return {
        **template,
        "byte level": level,
        "sequence": processors.Sequence([level, template["begin"]]),
        "sequence, the other way": processors.Sequence([template["both"], level]),
        "bert": processors.BertProcessing((END, 1), (BEGIN, 0)),
        "roberta": processors.RobertaProcessing((END, 1), (BEGIN, 0)),
    }


def backend_with(processor: Any) -> Backend:
    backend = byte_level()
    backend.post_processor = processor
    return backend


@pytest.mark.parametrize("name", post_processors())
@pytest.mark.parametrize("text", ["Hello there", "", f"{BEGIN} typed"])
def test_a_text_is_what_the_library_makes_of_it(name: str, text: str) -> None:
    """For a post-processor of each kind. A begin token that somebody types is text."""
    backend = backend_with(post_processors()[name])
    ours = Tokenizer(backend, end_of_text=END)
    assert ours.encode_text(text) == backend.encode(text).ids
    whole = list(ours.frame.begin) + ours.encode(text) + list(ours.frame.close)
    assert ours.encode_text(text) == whole
    assert not set(ours.control_ids.values()) & set(ours.encode(text))


@pytest.mark.parametrize("name", post_processors())
def test_what_is_written_is_the_same(name: str) -> None:
    ours = Tokenizer(backend_with(post_processors()[name]), end_of_text=END)
    names = {number: ours.name(number) for number in ours.control_ids.values()}
    content = json.loads(ours.to_json()) | {"post_processor": template_processing(ours.frame, names)}
    again = Backend.from_str(json.dumps(content))
    assert again.encode("Hello").ids == ours.encode_text("Hello")
    state = json.loads(json.dumps(ours.frame.to_state()))
    assert TextFrame.of_state(state, "state.json") == ours.frame


def test_no_post_processor_means_nothing_but_for_ours() -> None:
    """Tokenizers that are trained here have none, and their documents are divided by the end of text."""
    assert Tokenizer(byte_level(), end_of_text=END).encode_text("") == []
    here = Tokenizer.train(["Hello there"], 300)
    assert here.encode_text("Hello") == [here.end_of_text_id, *here.encode("Hello")]
    divided = Tokenizer(byte_level(), end_of_text=END).dividing_documents()
    assert divided.encode_text("Hello")[0] == divided.end_of_text_id


def test_ends_are_those_that_a_token_has() -> None:
    ours = Tokenizer(byte_level(), end_of_text=END)
    named = ours.framed(ours.frame.with_ends([1, 0, 99_999], "config.json"))
    assert named.end_ids == {0, 1} and named.frame.ends[-1] == (99_999, "config.json")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"type": "Magic"}, "its post_processor 'Magic' is not supported"),
        ({"type": "TemplateProcessing", "single": []}, "does not write a text once"),
        (
            {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}]},
            "does not write a text once",
        ),
        (
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
            "names the token '<s>' without its id",
        ),
        ({"type": "BertProcessing", "cls": ["<s>", -1]}, "is damaged"),
        (
            {
                "type": "Sequence",
                "processors": [{"type": "BertProcessing", "cls": ["a", 1], "sep": ["b", 2]}] * 2,
            },
            "puts tokens around a text twice",
        ),
        (7, "is damaged"),
    ],
)
def test_a_post_processor_that_is_not_known_is_named(processor: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_post_processor({"post_processor": processor}, "x/tokenizer.json")


@pytest.mark.parametrize("value", [7, {}, {"begin": [-1], "close": [], "ends": [], "source": ""}])
def test_a_damaged_state_is_named(value: Any) -> None:
    with pytest.raises(UserError, match=r"state\.json: `texts` does not say what stands around a text"):
        TextFrame.of_state(value, "state.json")


def test_an_id_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="puts the id 5000 around a text, and has no such token"):
        Tokenizer(byte_level(), end_of_text=END, frame=TextFrame((5000,)))
