"""Small whole models in every format that is read, and what a case of the campaign does to one of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from chatwright import checkpoint
from chatwright.chat import NATIVE
from chatwright.interop.families import FAMILIES, config_from_hf
from chatwright.interop.gguf import load_gguf
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import CONTROLS, Tokenizer
from support import broken_files
from support.vocabularies import sentencepiece

KINDS = ("gguf", "safetensors", "tokenizer", "config", "index", "template")
FAMILY_FILES = ("llama", "qwen3", "gpt2", "openai-gpt", "gemma3_text", "gpt_neox", "smollm3")
WIDTH = 32


def _hf_values(family: str, vocab: int) -> dict[str, Any]:
    if family in ("gpt2", "openai-gpt"):
        return {
            "model_type": family,
            "vocab_size": vocab,
            "n_positions": 16,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 2,
        }
    values = {
        "model_type": family,
        "vocab_size": vocab,
        "max_position_embeddings": 16,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": {"gpt_neox": "gelu", "gemma3_text": "gelu_pytorch_tanh"}.get(family, "silu"),
    }
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"qwen3": yarn, "llama": llama3}.get(family, {"rope_type": "default", "rope_theta": 1e4})
    return values | {"rope_parameters": scaling}


def _hf_tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = config_from_hf(values)
    state = GPT(config).state_dict()
    tensors = {}
    for rule in FAMILIES[values["model_type"]].rules:
        for layer in range(config.layers) if "{}" in rule.theirs else (0,):
            theirs, own = rule.names(layer)
            if not (config.tied and own[0] == "head.weight"):
                tensors[theirs] = torch.randn(rule.stored_shape([state[name].shape for name in own])) / 5
    return tensors


def _gguf_parts(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]], bytes]:
    """Metadata, tensors (name, sizes with the innermost first, type, offset) and their bytes: a Llama, partly
    Q8_0."""
    from gguf.quants import quantize

    tokens = [tokenizer.name(number) for number in range(tokenizer.vocab_size)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_json())["model"]["merges"]]
    values = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.context_length": 16,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(tokens),
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in tokenizer.controls else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.chat_template": NATIVE.source,
    }
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "rope_freqs": (8,)}
    block = {
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "attn_output": (WIDTH, WIDTH),
        "attn_q": (WIDTH, WIDTH),
    }
    block |= {
        "attn_k": (16, WIDTH),
        "attn_v": (16, WIDTH),
        "ffn_gate": (32, WIDTH),
        "ffn_up": (32, WIDTH),
        "ffn_down": (WIDTH, 32),
    }
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    random, tensors, data = np.random.default_rng(0), [], b""
    for number, (name, shape) in enumerate(shapes.items()):
        numbers = (1 + random.random(shape)).astype(np.float32)
        kind = 8 if len(shape) == 2 and number % 2 else 0
        content = quantize(numbers, 8).tobytes() if kind else numbers.tobytes()
        tensors.append((f"{name}.weight", list(shape[::-1]), kind, len(data)))
        data += content + bytes(-len(content) % 32)
    return values, tensors, data


class Specimens:
    """Whole models on disk, and their contents in memory. `place` is a directory that may be written to."""

    def __init__(self, place: Path) -> None:
        torch.manual_seed(0)
        self.place = place
        self.tokenizer = Tokenizer.train(["Hello there, how are you today? I am fine, thank you."] * 4, 300)
        self.tokens = json.loads(self.tokenizer.to_json())
        self.pieces = json.loads(_pieces().to_str())
        """A vocabulary of SentencePiece's kind."""
        self.settings = {
            "bos_token": "<|endoftext|>",
            "eos_token": {"content": "<|end|>"},
            "chat_template": NATIVE.source,
        }
        for family in FAMILY_FILES:
            values = _hf_values(family, self.tokenizer.vocab_size)
            self._hf(place / family, values)
            save_file(_hf_tensors(values), place / family / "model.safetensors")
        values = _hf_values("llama", 400)
        self._hf(place / "spm", values)
        save_file(_hf_tensors(values), place / "spm" / "model.safetensors")
        (place / "spm" / "tokenizer.json").write_text(json.dumps(self.pieces))
        values = _hf_values("llama", self.tokenizer.vocab_size)
        self._hf(place / "shards", values)
        tensors = load_file(place / "llama" / "model.safetensors")
        parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
        for number, (name, tensor) in enumerate(tensors.items()):
            parts["ab"[number % 2] + ".safetensors"][name] = tensor
        for name, part in parts.items():
            save_file(part, place / "shards" / name)
        self.index = {
            "metadata": {"total_size": 1},
            "weight_map": {name: file for file, part in parts.items() for name in part},
        }
        (place / "shards" / "model.safetensors.index.json").write_text(json.dumps(self.index))
        model = GPT(
            GPTConfig.preset(
                "modern-nano", vocab_size=self.tokenizer.vocab_size, context=16, width=32, mlp_width=32
            )
        )
        card = {
            "kind": "language",
            "model": model.config.to_dict(),
            "end_of_turn": "<|end|>",
            "end_of_text": "<|endoftext|>",
            "texts": self.tokenizer.frame.to_state(),
        }
        texts = {"tokenizer.json": self.tokenizer.to_json(), "chat_template.jinja": NATIVE.source}
        checkpoint.save_checkpoint(
            place / "own", tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts
        )
        self.state = {**card, "files": {}}
        self.gguf = _gguf_parts(self.tokenizer)
        values, tensors, data = _gguf_parts(Tokenizer(_pieces(), end_of_text="</s>"))
        self.gguf_pieces = (values | _sentencepiece_keys(_pieces()), tensors, data)
        for parts in (self.gguf, self.gguf_pieces):
            (place / "m.gguf").write_bytes(broken_files.gguf_bytes(*parts)[0])
            assert load_gguf(place / "m.gguf").tokenizer is not None
        for name in (*FAMILY_FILES, "shards", "spm", "own"):
            assert load_parts(place / name).tokenizer is not None

    def _hf(self, directory: Path, values: dict[str, Any]) -> None:
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(values))
        (directory / "tokenizer.json").write_text(self.tokenizer.to_json())
        (directory / "tokenizer_config.json").write_text(json.dumps(self.settings))

    def damaged(self, kind: str, random: Random, work: Path) -> Path:
        """A model with one damaged file, in the empty directory `work`."""
        if kind == "gguf" or (kind == "template" and random.random() < 0.2):
            values, tensors, data = random.choice((self.gguf, self.gguf_pieces))
            file = work / "m.gguf"
            if kind == "template":
                values = {
                    **values,
                    "tokenizer.chat_template": broken_files.hostile_template(random, NATIVE.source),
                }
                file.write_bytes(broken_files.gguf_bytes(values, tensors, data)[0])
            else:
                file.write_bytes(broken_files.damage_gguf(random, values, tensors, data))
            return file
        name, content, model = getattr(self, f"_{kind}")(random)
        return self._with(work, model, name, content)

    def _safetensors(self, random: Random) -> tuple[str, bytes, str]:
        model = random.choice(("llama", "qwen3", "gpt2", "own"))
        data = (self.place / model / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        if random.random() < 0.5:
            return "model.safetensors", broken_files.damage_bytes(random, data, head=length + 8), model
        header = broken_files.json_text(
            random, broken_files.damage_json(random, json.loads(data[8 : 8 + length]))
        )
        size = random.choice(broken_files.EDGES) if random.random() < 0.1 else len(header)
        return "model.safetensors", size.to_bytes(8, "little") + header + data[8 + length :], model

    def _tokenizer(self, random: Random) -> tuple[str, bytes, str]:
        model = random.choice(("llama", "own", "spm"))
        tokens = self.pieces if model == "spm" else self.tokens
        if random.random() < 0.15:
            return (
                "tokenizer_config.json",
                broken_files.json_text(random, broken_files.damage_json(random, self.settings)),
                "llama",
            )
        if random.random() < 0.3:
            return (
                "tokenizer.json",
                broken_files.damage_bytes(random, json.dumps(tokens).encode(), head=1_500),
                model,
            )
        content = broken_files.damage_json(random, tokens)
        if random.random() < 0.6:
            content = dict([*tokens.items(), _strange_part(random)])
        return "tokenizer.json", broken_files.json_text(random, content), model

    def _config(self, random: Random) -> tuple[str, bytes, str]:
        model = random.choice((*FAMILY_FILES, "own", "own", "result"))
        if model == "result":
            found: Any = {"model": random.choice((*broken_files.ODD, "step-000001", "x" * 300))}
            return "result.json", broken_files.json_text(random, found), "own"
        if model == "own":
            return (
                "state.json",
                broken_files.json_text(random, broken_files.damage_json(random, self.state)),
                model,
            )
        values = json.loads((self.place / model / "config.json").read_text())
        return "config.json", broken_files.json_text(random, broken_files.damage_json(random, values)), model

    def _index(self, random: Random) -> tuple[str, bytes, str]:
        content = broken_files.json_text(random, broken_files.damage_json(random, self.index))
        return "model.safetensors.index.json", content, "shards"

    def _template(self, random: Random) -> tuple[str, bytes, str]:
        source = broken_files.hostile_template(random, NATIVE.source)
        if random.random() < 0.2:
            return (
                "tokenizer_config.json",
                json.dumps({**self.settings, "chat_template": source}).encode(),
                "llama",
            )
        return "chat_template.jinja", source.encode("utf-8", "surrogatepass"), random.choice(("own", "llama"))

    def _with(self, work: Path, model: str, name: str, content: bytes) -> Path:
        """A copy of a model in which one file is another. Checkpoints lose their checksums, or all would end
        there."""
        for file in (self.place / model).iterdir():
            if file.name == "state.json":
                (work / file.name).write_text(json.dumps(self.state))
            elif file.name != name:
                os.link(file, work / file.name)
        if name == "result.json":
            (work / "state.json").unlink()
        (work / name).write_bytes(content)
        return work


def _pieces() -> Any:
    """A vocabulary of SentencePiece's kind, with the control tokens of the template."""
    backend = sentencepiece("llama", size=100, extra=tuple(CONTROLS))
    tokens = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=tokens)
    return backend


def _sentencepiece_keys(backend: Any) -> dict[str, Any]:
    """What a GGUF file says of such a vocabulary."""
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    kinds = [3 if token in special else 6 if token.startswith("<0x") else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _strange_part(random: Random) -> tuple[str, Any]:
    """A part of a tokenizer.json in its place, with settings that cost time or memory, or that do not fit
    each other."""
    patterns = (
        "(a+)+$",
        "(x{1000}){1000}",
        "((((a{99}){99}){99}){99})",
        "(",
        "(?=(a*)*)b",
        "",
        "(?<!a{1,99})",
        "\\p{L}*" * 500,
        "(a|aa)+c",
        "(?:(?:a*)*)*c",
        "[[[[",
        "\\p{Nope}",
        "(?R)",
        "(?<x>a\\g<x>)",
    )
    pattern = random.choice(patterns)
    behavior = random.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous"))
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": random.random() < 0.5,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": random.random() < 0.5,
    }
    big, content = (
        random.choice(broken_files.EDGES),
        random.choice(("", "a", "<|endoftext|>", "é" * 99, "\0", " ")),
    )
    added = {
        "id": big,
        "content": content,
        "single_word": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
        "special": True,
    }
    known = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}
    return random.choice(
        (
            ("pre_tokenizer", split),
            ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split, level]}),
            ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [level] * random.choice((0, 2, 20))}),
            (
                "pre_tokenizer",
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ),
            ("pre_tokenizer", {"type": "FixedLength", "length": big}),
            (
                "normalizer",
                {
                    "type": "Replace",
                    "pattern": {"Regex": pattern},
                    "content": "y" * random.choice((0, 1, 100_000)),
                },
            ),
            (
                "normalizer",
                {
                    "type": "Replace",
                    "pattern": {"String": content},
                    "content": "y" * random.choice((0, 1, 100_000)),
                },
            ),
            (
                "normalizer",
                {
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}]
                    * random.choice((1, 4, 9)),
                },
            ),
            ("normalizer", {"type": "Prepend", "prepend": "z" * 100_000}),
            (
                "normalizer",
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": random.choice(("AAAA", "//////8=", "gAAAAP////8AAAAA", "")),
                },
            ),
            (
                "normalizer",
                {"type": random.choice(("NFKC", "StripAccents", "Nmt", "Lowercase", "ByteLevel"))},
            ),
            (
                "padding",
                {
                    "strategy": {"Fixed": big},
                    "direction": "Right",
                    "pad_to_multiple_of": random.choice((None, big)),
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "x",
                },
            ),
            (
                "truncation",
                {
                    "direction": "Left",
                    "max_length": big,
                    "strategy": "LongestFirst",
                    "stride": random.choice(broken_files.EDGES),
                },
            ),
            (
                "post_processor",
                {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 99,
                    "pair": [],
                    "special_tokens": {},
                },
            ),
            (
                "post_processor",
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": content, "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [],
                    "special_tokens": {content: {"id": content, "ids": [big % 2**32], "tokens": [content]}},
                },
            ),
            (
                "post_processor",
                {"type": "BertProcessing", "sep": [content, big % 2**32], "cls": [content, 1]},
            ),
            (
                "decoder",
                {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": content}, "content": "y" * (big % 40)},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": big, "stop": 0},
                    ],
                },
            ),
            (
                "normalizer",
                {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": content},
                        {"type": "Replace", "pattern": {"String": " "}, "content": content},
                        {"type": "Strip", "strip_left": True, "strip_right": False},
                    ],
                },
            ),
            (
                "decoder",
                {
                    "type": "Sequence",
                    "decoders": [level, {"type": "Strip", "content": "a", "start": big, "stop": big}],
                },
            ),
            (
                "model",
                {
                    "type": "Unigram",
                    "unk_id": random.choice((big, 0, None)),
                    "vocab": [["a", -1.0], [random.choice(("b", "a", "", "<0x41>")), -2.0], ["</s>", 0.0]],
                    "byte_fallback": True,
                },
            ),
            ("model", {"type": "WordLevel", "vocab": {"<|endoftext|>": big % 2**32}, "unk_token": "a"}),
            (
                "model",
                {
                    "type": "WordPiece",
                    "vocab": {"a": 0},
                    "unk_token": "b",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": big,
                },
            ),
            ("model", {"type": "BPE", "vocab": {**known, "z": big % 2**32}, "merges": []}),
            ("model", {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}),
            (
                "model",
                {
                    "type": "BPE",
                    "dropout": 0.5,
                    "vocab": known,
                    "merges": [["a", "b"]],
                    "fuse_unk": True,
                    "unk_token": "q",
                },
            ),
            (
                "model",
                {
                    "type": "BPE",
                    "vocab": known,
                    "merges": [["a", "b"]],
                    "continuing_subword_prefix": "é",
                    "end_of_word_suffix": "b",
                },
            ),
            (
                "model",
                {
                    "type": "BPE",
                    "vocab": known,
                    "merges": [["a", "b"]],
                    "byte_fallback": True,
                    "ignore_merges": True,
                },
            ),
            ("added_tokens", [added]),
            ("added_tokens", [{**added, "id": number} for number in range(random.choice((3, 3_000)))]),
        )
    )


def use(path: Path) -> None:
    """Load a model, and use what came with it a little: what a reader lets pass must not break its user."""
    parts = load_parts(path)
    with torch.no_grad():
        parts.model(torch.zeros((1, 2 if parts.model.config.context > 1 else 1), dtype=torch.int64))
    if parts.tokenizer is not None:
        ids = parts.tokenizer.encode("Hello <|end|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab é\n 12345")
        parts.tokenizer.decode(ids)
        assert max(ids, default=0) < parts.model.config.vocab_size
        if parts.template is not None:
            parts.template.encode(
                [{"role": "user", "content": "Hi"}], parts.tokenizer, add_generation_prompt=True
            )


def empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
