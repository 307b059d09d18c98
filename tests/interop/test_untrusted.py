"""Model files that lie: each lie is found before memory is taken or time is spent for it, and named in one
line."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatwright.config import UserError
from chatwright.interop.gguf_file import read_gguf
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.tokenizer import Tokenizer

HUGE = 2**60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(tensors: int, fields: int, *parts: bytes, data: int = 256) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)
    return header + bytes(-len(header) % 32) + bytes(data)


A = tensor("a", (32, 2), 0, 0)  # 256 bytes
LIES: dict[str, tuple[bytes, str]] = {
    "fields": (gguf(0, HUGE), f"{HUGE} entries are said to follow"),
    "tensors": (gguf(HUGE, 0), f"{HUGE} entries are said to follow"),
    "long key": (gguf(0, 1, struct.pack("<Q", HUGE)), f"{HUGE} bytes are said to follow"),
    "long text": (gguf(0, 1, field("k", 8, struct.pack("<Q", HUGE))), f"{HUGE} bytes are said to follow"),
    "long list": (
        gguf(0, 1, field("k", 9, struct.pack("<IQ", 4, HUGE))),
        f"{4 * HUGE} bytes are said to follow",
    ),
    "list of texts": (
        gguf(0, 1, field("k", 9, struct.pack("<IQ", 8, HUGE))),
        f"{HUGE} entries are said to follow",
    ),
    "list of lists": (gguf(0, 1, field("k", 9, struct.pack("<IQ", 9, 1))), "a list of items of type 9"),
    "unknown type": (gguf(0, 1, field("k", 13, b"")), "metadata of unknown type 13"),
    "key twice": (gguf(0, 2, field("k", 4, bytes(4)), field("k", 4, bytes(4))), "'k' occurs twice"),
    "no text": (gguf(0, 1, field("k", 8, struct.pack("<Q", 1) + b"\xff")), "can't decode byte 0xff"),
    "alignment": (gguf(0, 1, field("general.alignment", 4, struct.pack("<I", 24))), "an alignment of 24"),
    "alignment of nothing": (gguf(0, 1, field("general.alignment", 4, bytes(4))), "an alignment of 0"),
    "alignment in words": (gguf(0, 1, field("general.alignment", 8, text("x"))), "an alignment of 'x'"),
    "dimensions": (gguf(1, 0, tensor("a", (1,) * 5, 0, 0)), "'a' has 5 dimensions"),
    "many dimensions": (
        gguf(1, 0, text("a") + struct.pack("<I", 2**31) + bytes(20)),
        f"'a' has {2**31} dimensions",
    ),
    "large tensor": (
        gguf(1, 0, tensor("a", (HUGE, HUGE), 0, 0)),
        f"'a' ends at byte {4 * HUGE * HUGE + 96} of 352",
    ),
    "far tensor": (gguf(1, 0, tensor("a", (32,), 0, HUGE)), "'a' ends at byte"),
    "no tensor": (gguf(1, 0, tensor("a", (32, 0), 0, 0)), "'a' has the shape (0, 32)"),
    "half a block": (gguf(1, 0, tensor("a", (16,), 8, 0)), "'a' has the shape (16,)"),
    "unknown numbers": (gguf(1, 0, tensor("a", (32,), 4, 0)), "'a' is of unknown type 4"),
    "name twice": (gguf(2, 0, A, A), "two tensors have the same name"),
    "one over the other": (gguf(2, 0, A, tensor("b", (32,), 0, 32)), "'a' and 'b' lie over each other"),
    "version": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
}


@pytest.mark.parametrize("lie", LIES)
def test_gguf_headers(lie: str, tmp_path: Path) -> None:
    content, message = LIES[lie]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_gguf(file)
    assert f"{file} is damaged or cut short" in str(caught.value)
    assert message in str(caught.value)


def test_a_true_header(tmp_path: Path) -> None:
    """The same bytes without a lie are read: the refusals above are for what they say."""
    file = tmp_path / "m.gguf"
    values = field("k", 9, struct.pack("<IQ2i", 5, 2, -1, 7)) + field(
        "general.alignment", 4, struct.pack("<I", 64)
    )
    file.write_bytes(gguf(2, 2, values, tensor("a", (32, 1), 0, 0), tensor("b", (), 0, 128), data=320))
    found = read_gguf(file)
    assert found.values == {"k": [-1, 7], "general.alignment": 64}
    assert [(one.name, one.shape, one.size) for one in found.tensors] == [("a", (1, 32), 128), ("b", (1,), 4)]
    assert found.tensors[1].offset - found.tensors[0].offset == 128
    assert found.tensors[0].offset % 64 == 0
    assert torch.equal(found.tensors[0].read(), torch.zeros(1, 32))


def copy_of(chat_dir: Path, tmp_path: Path, **changes: Any) -> Path:
    """A model of ours with another state.json, without checksums."""
    shutil.copytree(chat_dir, tmp_path / "m")
    file = tmp_path / "m" / "state.json"
    state = json.loads(file.read_text())
    state["model"] |= changes.pop("model", {})
    file.write_text(json.dumps({**state, "files": {}, **changes}))
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": 2**29}}, "536870912 blocks in state.json"),
        (
            {"model": {"vocab_size": 2**29}},
            "tensor embed.weight has shape (320, 64), the model has (536870912, 64)",
        ),
        ({"model": {"width": 2**40}}, "width is 1099511627776; it can be 1 to"),
        ({"model": {"heads": 2**29, "kv_heads": 1}}, "more than 1073741824 features"),
        ({"model": {"vocab_size": "320"}}, "vocab_size is '320', not of type int"),
        ({"model": {"norm_eps": float("nan")}}, "norm_eps is nan"),
        ({"model": {"kv_heads": -1}}, "kv_heads is -1; it can be 1 to"),
        ({"end_of_turn": 7}, "must be names of tokens"),
        ({"end_of_text": ["a"]}, "must be names of tokens"),
    ],
)
def test_states(changes: dict[str, Any], message: str, chat_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_parts(copy_of(chat_dir, tmp_path, **changes))
    assert message in str(caught.value)


def test_whole_numbers_for_weights(chat_dir: Path, tmp_path: Path) -> None:
    path = copy_of(chat_dir, tmp_path)
    tensors = {
        name: tensor.long()
        for name, tensor in load_parts(path).model.state_dict().items()
        if name != "head.weight"
    }
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match=r"has numbers of type torch\.int64"):
        load_parts(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5_000, "..", "/etc"])
def test_results_that_name_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"model": name}))
    with pytest.raises(UserError):
        load_parts(tmp_path)


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PARTS: list[tuple[str, Any, str]] = [
    (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "//////8="},
        "normalizer 'Precompiled' is not supported",
    ),
    (
        "normalizer",
        {"type": "Prepend", "prepend": "z" * 17},
        "its normalizer puts 17 characters in front of a text",
    ),
    (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 4},
                {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aaa"},
            ],
        },
        "its normalizer could make a text 16 times as long",
    ),
    (
        "normalizer",
        {"type": "Replace", "pattern": {"String": ""}, "content": "a"},
        "its normalizer replaces the empty text",
    ),
    ("normalizer", {"type": "Replace", "pattern": "a", "content": "a"}, "normalizer Replace is damaged"),
    (
        "pre_tokenizer",
        {"type": "Sequence", "pretokenizers": [LEVEL, LEVEL]},
        "pre_tokenizer has too many parts",
    ),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer 'Whitespace' is not supported"),
    ("decoder", {"type": "CTC"}, "its decoder 'CTC' is not supported"),
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [70_000], "tokens": ["x"]}},
        },
        "puts the id 70000 around a text, and has no such token",
    ),
    (
        "post_processor",
        {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": [{}] * 17}]},
        "too many parts",
    ),
    (
        "model",
        {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "a"},
        "of kind WordLevel, not BPE",
    ),
    ("model", {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, "the tokenizer has the id 2147483648"),
    ("model", 7, "is not a tokenizer"),
]


@pytest.mark.parametrize(("place", "part", "message"), PARTS)
def test_parts_of_tokenizers(
    place: str, part: Any, message: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Damaged, the first of these would end the process; the others make texts longer without end, or huge
    tables."""
    content = json.loads(small_tokenizer.to_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, place: part}))
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


def test_padding_and_truncation_are_left_out(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They would make 2 ** 40 ids of every text, or lose its end."""
    content = json.loads(small_tokenizer.to_json())
    content["padding"] = {
        "strategy": {"Fixed": 2**40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    said = "Hello there, how are you today?"
    assert Tokenizer.load(tmp_path).encode(said) == small_tokenizer.encode(said)


def test_ids_that_no_token_has(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The size of a vocabulary is what tables need: the largest id and one more."""
    content = json.loads(small_tokenizer.to_json())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    vocab[last] += 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).vocab_size == small_tokenizer.vocab_size + 100


def test_errors_are_one_line_whatever_the_names() -> None:
    assert str(UserError("a\n  b\tc\x1b[2J\ud800\u202e")) == "a b c\\x1b[2J\\ud800\\u202e"
    with pytest.raises(UserError) as caught:
        GPTConfig.from_dict({"a\x1b[31mb": 1})
    assert str(caught.value).isprintable()


def test_json_that_is_too_deep(chat_dir: Path, tmp_path: Path) -> None:
    path = copy_of(chat_dir, tmp_path)
    for name, message in (("state.json", "cannot be read"), ("tokenizer.json", "is not a tokenizer")):
        whole = (path / name).read_bytes()
        (path / name).write_text("[" * 200_000)
        with pytest.raises(UserError, match=message):
            load_parts(path)
        (path / name).write_bytes(whole)
