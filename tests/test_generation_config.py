"""A model's own sampling settings: read, told, kept by what is trained from it, written by the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatwright import generation_config, language_model
from chatwright.config import UserError
from chatwright.generation_config import GenerationConfig, chat_options, end_ids_of, own_default, told
from chatwright.interop.hf_export import plan_hf
from chatwright.language_model import LanguageModel
from chatwright.model_names import weights_note
from chatwright.train.base import ChatBase, model_texts

MAKERS = GenerationConfig(temperature=0.2, top_p=0.9, source="the example of its makers")


def test_a_file_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    values = {
        "eos_token_id": 2,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = GenerationConfig.load(tmp_path)
    assert found == GenerationConfig(temperature=0.6, top_k=20, top_p=0.9)
    assert found is not None and found.options() == {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert json.loads(found.to_json()) == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    drawn = GenerationConfig.of({"do_sample": True, "top_p": 0.9}, where="x")
    assert drawn == GenerationConfig(temperature=1.0, top_p=0.9)
    greedy = GenerationConfig.of({"do_sample": False}, where="x")
    assert greedy is not None and greedy.options() == {"temperature": 0.0}
    assert greedy.to_values() == {"do_sample": False}
    assert GenerationConfig.load(tmp_path / "elsewhere") is None
    assert GenerationConfig.of({"eos_token_id": 2}, where="x") is None


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "min_p": None}, None),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_p": 0.0}, {"top_k": 1}),
        ({"temperature": 1e-9}, {"temperature": 0.0}),
        ({"temperature": 3}, {"temperature": 3}),
        ({"do_sample": None, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
    ],
)
def test_what_makers_write_is_read(values: dict[str, Any], options: dict[str, Any] | None) -> None:
    """Also values that mean "off", and those that a request could not have."""
    from chatwright.generate.sampling import Sampling

    found = GenerationConfig.of(values, where="x")
    assert found is not None
    if options is not None:
        assert found.options() == options
    sampling = Sampling(**found.options())
    assert options is not None or sampling == Sampling()


@pytest.mark.parametrize(
    ("value", "ids"), [(2, [2]), ([2, 5], [2, 5]), (None, []), (-1, []), ([7, -1, None], [7]), (2**40, [])]
)
def test_ends_are_a_number_or_a_list(value: Any, ids: list[int]) -> None:
    assert list(end_ids_of({"eos_token_id": value}, "x")) == ids


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [[2]]])
def test_other_ends_are_named(value: Any) -> None:
    with pytest.raises(UserError, match=r"x: eos_token_id is .*; it must be ids of tokens"):
        list(end_ids_of({"eos_token_id": value}, "x"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be 0, or a number above it"),
        ({"temperature": -1}, "temperature is -1; it must be 0, or a number above it"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be between 0 and 1"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"repetition_penalty": True}, "repetition_penalty is True; it must be a number above 0"),
        ([1], "expected an object"),
    ],
)
def test_a_broken_file_is_named(values: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        GenerationConfig.load(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_given_goes_before_what_the_makers_say() -> None:
    assert chat_options(None) == {"temperature": 0.7}
    assert chat_options(MAKERS) == {"temperature": 0.2, "top_p": 0.9}
    assert chat_options(MAKERS, {"temperature": 1.0}) == {"temperature": 1.0, "top_p": 0.9}
    assert told(None) == "temperature 0.7 (the default, for the model recommends none)"
    assert told(MAKERS) == "temperature 0.2, top-p 0.9 (from the example of its makers)"
    assert told(MAKERS, {"temperature": 1.0}) == (
        "temperature 1, top-p 0.9 (as given; from the example of its makers)"
    )
    assert told(MAKERS, {"temperature": 1.0, "top_p": 1.0}) == "temperature 1 (as given)"


def test_a_language_model_uses_them(sft_parts: Callable[[], Any]) -> None:
    parts = sft_parts()
    plain = LanguageModel(parts.model, parts.tokenizer, parts.template, "x")
    own = LanguageModel(parts.model, parts.tokenizer, parts.template, "x", generation=MAKERS)
    asked = [{"role": "user", "content": "How is the cat number 5?"}]
    for model, expected in ((plain, (0.7, 1.0)), (own, (0.2, 0.9))):
        sampling = model.chat_request(asked)[0].sampling
        assert (sampling.temperature, sampling.top_p) == expected
        sampling = model.prompt_request("The cat").sampling
        assert (sampling.temperature, sampling.top_p) == expected
    sampling = own.chat_request(asked, temperature=0.5)[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    greedy = replace(MAKERS, temperature=0.0)
    twice = LanguageModel(parts.model, parts.tokenizer, parts.template, "x", generation=greedy)
    assert twice.chat(asked, max_new_tokens=8) == twice.chat(asked, max_new_tokens=8)


def test_smollm2_has_those_of_its_makers(
    monkeypatch: pytest.MonkeyPatch, sft_parts: Callable[[], Any]
) -> None:
    from chatwright.data import archives
    from chatwright.interop import gguf

    monkeypatch.setattr(archives, "smollm2_gguf", lambda: Path("smollm2.gguf"))
    monkeypatch.setattr(gguf, "load_gguf", lambda path: sft_parts())
    model = language_model.load("smollm2")
    assert model.own_sampling == {"temperature": 0.2, "top_p": 0.9}
    note = weights_note("smollm2")
    assert "4-bit" in note and "hf:HuggingFaceTB/SmolLM2-135M-Instruct" in note and "270 MB" in note
    assert weights_note("smollm2+runs/my/sft") == note
    assert weights_note("runs/my/sft") == ""


def test_checkpoints_and_exports_keep_them(sft_parts: Callable[[], Any], tmp_path: Path) -> None:
    parts = replace(sft_parts(), generation=MAKERS)
    base = ChatBase(parts.model, parts.tokenizer, parts.template, "x", parts.generation)
    texts = model_texts(base.tokenizer, base.template, base.generation)
    (tmp_path / "generation_config.json").write_text(texts["generation_config.json"])
    assert GenerationConfig.load(tmp_path) == MAKERS
    assert generation_config.FILE not in model_texts(base.tokenizer, base.template)
    written = json.loads(plan_hf(parts).texts["generation_config.json"])
    assert (written["temperature"], written["top_p"], written["do_sample"]) == (0.2, 0.9, True)
    assert written["eos_token_id"]
    # What is trained here from a model that recommends nothing recommends our default.
    assert sft_parts().generation == own_default() == GenerationConfig(temperature=0.7)
    assert json.loads(plan_hf(sft_parts()).texts["generation_config.json"])["temperature"] == 0.7
    nothing = replace(sft_parts(), generation=None)
    assert "temperature" not in json.loads(plan_hf(nothing).texts["generation_config.json"])
