"""GGUF files: their tokenizer and template, and what is refused, in one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

from chatwright.config import UserError
from chatwright.interop.gguf import load_gguf
from chatwright.interop.gguf_tokenizer import PRE_TOKENIZERS
from chatwright.tokenizer import Tokenizer, byte_alphabet

WORDS = ["th", "the", "Ġthe", "Ġa", "12", "123", "ĠĠ"]
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "1 2", "12 3", "Ġ Ġ"]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROLS, *byte_alphabet(), *WORDS, "<think>"]
TYPES = [3, 3, 3, *[1] * (256 + len(WORDS)), 4]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
WIDTH, LAYERS, MLP = 32, 2, 32

METADATA: dict[str, Any] = {
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100_000.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_output": (WIDTH, WIDTH)}
        block |= {"attn_q": (WIDTH, WIDTH), "attn_k": (16, WIDTH), "attn_v": (16, WIDTH)}
        block |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    changes: dict[str, Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A small Llama; `changes` to the metadata, None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **(changes or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in (tensors() if weights is None else weights).items():
        if tensor.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_gguf(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def tokenizer_of(file: Path, pre: str) -> Tokenizer:
    tokenizer = load_gguf(write(file, {"tokenizer.ggml.pre": pre})).tokenizer
    assert tokenizer is not None
    return tokenizer


def test_model(file: Path) -> None:
    loaded = load_gguf(write(file))
    config = loaded.model.config
    assert (config.layers, config.kv_heads, config.head_dim, config.tied) == (LAYERS, 1, 16, True)
    assert config.norm_eps == 1e-5  # exactly: not the neighbour of 1e-5 in float32 that the file holds
    assert config.rope_base == 100_000.0
    stored = tensors()
    assert np.array_equal(loaded.model.embed.weight.detach().numpy(), stored["token_embd.weight"])
    query = stored["blk.1.attn_q.weight"].reshape(2, 8, 2, WIDTH)  # (heads, pairs, 2, inputs)
    rows = loaded.model.state_dict()["blocks.1.attention.query.weight"].numpy().reshape(2, 2, 8, WIDTH)
    for half in range(2):
        assert np.array_equal(rows[:, half], query[:, :, half])


def test_dtype(file: Path) -> None:
    model = load_gguf(write(file), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wanted = torch.from_numpy(tensors()["token_embd.weight"]).bfloat16()
    assert torch.equal(model.embed.weight, wanted)


def test_untied(file: Path) -> None:
    weights = tensors()
    weights["output.weight"] = weights["token_embd.weight"] + 1
    model = load_gguf(write(file, weights=weights)).model
    assert not model.config.tied
    assert np.array_equal(model.head.weight.detach().numpy(), weights["output.weight"])


def test_tokenizer(file: Path) -> None:
    tokenizer = tokenizer_of(file, "smollm")
    assert tokenizer.controls == tuple(CONTROLS)
    assert tokenizer.end_of_text == "<|endoftext|>"
    assert tokenizer.vocab_size == len(TOKENS)
    assert [tokenizer.name(number) for number in tokenizer.encode("the the")] == ["the", "Ġthe"]
    assert tokenizer.encode("<think>") == [len(TOKENS) - 1]  # the model's own word, not a control token
    assert tokenizer.decode([0, *tokenizer.encode("the <|im_end|> é😀"), 2]) == "the <|im_end|> é😀"
    assert not {0, 1, 2} & set(tokenizer.encode("<|endoftext|><|im_start|><|im_end|>"))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a  123", ["a", "Ġ", "Ġ", "123"]),
        ("smollm", "a  123", ["a", "ĠĠ", "1", "2", "3"]),
        ("starcoder", "a  123", ["a", "ĠĠ", "1", "2", "3"]),
        ("llama-bpe", "a  1231", ["a", "Ġ", "Ġ", "123", "1"]),
        ("qwen2", "a  123", ["a", "Ġ", "Ġ", "1", "2", "3"]),
        ("qwen2", "\n\nthe", ["Ċ", "Ċ", "the"]),
        ("llama-bpe", "!the", ["!", "the"]),
    ],
)
def test_where_text_is_cut(pre: str, text: str, pieces: list[str], file: Path) -> None:
    """By hand, from the pattern of each family and the seven merges above."""
    tokenizer = tokenizer_of(file, pre)
    assert [tokenizer.name(number) for number in tokenizer.encode(text)] == pieces


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(pre: str, file: Path) -> None:
    tokenizer = tokenizer_of(file, pre)
    for text in ("the  cat's 1234 <|im_end|>\r\n\t é 日本 😀 ", "\x00\x1f\u2028", " "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(b"\xff\xfe the")) == b"\xff\xfe the"


def test_template(file: Path) -> None:
    template = load_gguf(write(file)).template
    assert template is not None
    assert template.end == "<|im_end|>"
    assert template.render([{"role": "user", "content": "hi"}]) == "<|im_start|>user: hi<|im_end|>"
    named = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template = load_gguf(write(file, {"tokenizer.chat_template": named})).template
    assert template is not None
    assert template.end == "<|im_end|>"
    assert template.render([{"role": "user", "content": "hi"}]) == "<|im_start|>hi<|im_end|>"
    assert load_gguf(write(file, {"tokenizer.chat_template": None})).template is None


def test_weights_alone(file: Path) -> None:
    write(file, {"tokenizer.ggml.model": "bert"})
    assert "tokenizer=False) reads the weights alone" in error_of(file)
    loaded = load_gguf(file, tokenizer=False)
    assert (loaded.tokenizer, loaded.template) == (None, None)
    assert load_gguf(write(file, {"tokenizer.ggml.model": None})).tokenizer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rotary scaling of type 'longrope' is not supported"),
        ({"llama.rope.scaling.factor": -4.0}, "numbers of rope_scaling must be positive"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096 is not supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count differs from the head size 16"),
        ({"llama.attention.value_length": 8}, "attention.value_length differs from the head size 16"),
        ({"llama.attention.head_count": [2, 2]}, "llama.attention.head_count must be a whole number"),
        ({"llama.block_count": None}, "llama.block_count must be a whole number, not None"),
        ({"llama.block_count": 3}, "missing tensors: blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "no place for: blk.1.attn_k.weight"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon must be a number"),
        ({"llama.feed_forward_length": 48}, "blk.0.ffn_gate.weight (32 x 32, not 48 x 32)"),
        ({"llama.vocab_size": 7}, "tokens in its tokenizer, 7 in the model"),
        ({"split.count": 2}, "one of several pieces"),
        ({"tokenizer.ggml.pre": "unheard"}, "pre-tokenizer 'unheard' is not supported; supported: gpt-2,"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None is not supported"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "list of tokens is damaged"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "the"]}, "list of tokens is damaged"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges do not fit its tokens"),
        ({"tokenizer.ggml.eos_token_id": 9_999}, "eos_token_id is 9999, not one of its tokens"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, file: Path) -> None:
    assert message in error_of(write(file, changes))


def test_harmless_metadata(file: Path) -> None:
    changes = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "general.name": "small"}
    expected = load_gguf(write(file)).model.config
    assert load_gguf(write(file, changes)).model.config == expected


def test_refused_tensors(file: Path) -> None:
    scaled = {**tensors(), "rope_factors_long.weight": np.ones(8, np.float32)}
    assert "no place for: rope_factors_long.weight" in error_of(write(file, weights=scaled))
    biased = {**tensors(), "blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}
    assert "no place for: blk.0.attn_q.bias" in error_of(write(file, weights=biased))
    assert "not a language model" in error_of(write(file, weights={"x": np.ones(4, np.float32)}))


def test_refused_architecture(file: Path) -> None:
    assert "architecture 'gemma' is not supported; supported: llama, qwen3, gpt2" in error_of(
        write(file, architecture="gemma")
    )


@pytest.mark.parametrize("share", [0.0001, 0.005, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_truncated(share: float, file: Path) -> None:
    data = write(file).read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "GGUF file" in error_of(file) or "damaged or cut short" in error_of(file)


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"not a model at all", b"GGUF", b"GGUF" + bytes(100), b"GGUF" + b"\xff" * 100]
)
def test_not_gguf(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert "is not a GGUF file" in error_of(file) or "damaged or cut short" in error_of(file)


def test_no_such_file(tmp_path: Path) -> None:
    assert "is not a file" in error_of(tmp_path / "none.gguf")
    assert "is not a file" in error_of(tmp_path)


def test_unreadable_quantisation(file: Path) -> None:
    """Integers are no weights; the library does not turn them into numbers."""
    weights: dict[str, np.ndarray] = tensors()
    weights["output_norm.weight"] = np.ones(WIDTH, np.int32)
    assert "output_norm.weight is quantised as I32" in error_of(write(file, weights=weights))
