"""Directories as transformers writes them: what is read, and what is refused, in one line that names it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatwright.config import UserError
from chatwright.interop.families import FAMILIES, config_from_hf
from chatwright.interop.hf import load_hf, load_hub, state_dict_from_hf
from chatwright.interop.loaded import build
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
ARCEE = {**LLAMA, "model_type": "arcee", "hidden_act": "relu2"}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
}
GPT1 = {**GPT2, "model_type": "openai-gpt"}


def tensors_of(values: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors for a configuration, by the names of its family."""
    config = config_from_hf(values)
    state = GPT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for rule in FAMILIES[values["model_type"]].rules:
        for layer in range(config.layers) if "{}" in rule.theirs else (0,):
            theirs, own = rule.names(layer)
            if own[0] in state and not (config.tied and own[0] == "head.weight"):
                shape = rule.stored_shape([state[name].shape for name in own])
                tensors[theirs] = torch.randn(shape, generator=generator)
    return tensors


def save(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    save_file(tensors_of(values) if tensors is None else tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path, LLAMA)


def error_of(directory: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_hf(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("values", [LLAMA, QWEN3, ARCEE, GPT2, GPT1], ids=lambda values: values["model_type"])
def test_every_tensor_arrives(values: dict[str, Any]) -> None:
    """Each number of the file is in the model, once: sums of all parameters agree, and so do their counts."""
    tensors = tensors_of(values)
    model = build(config_from_hf(values), state_dict_from_hf(values, tensors))
    assert model.parameter_count() == sum(tensor.numel() for tensor in tensors.values())
    total = sum(float(tensor.double().sum()) for tensor in tensors.values())
    assert sum(float(p.detach().double().sum()) for p in model.parameters()) == pytest.approx(total, abs=1e-6)
    assert not model.training
    assert model.head.weight is model.embed.weight


def test_loading_copies(llama: Path) -> None:
    """Training the model does not touch the tensors it came from, and the file may go away."""
    tensors = tensors_of(LLAMA)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model = build(config_from_hf(LLAMA), state_dict_from_hf(LLAMA, tensors))
    loaded = load_hf(llama).model
    (llama / "model.safetensors").unlink()
    with torch.no_grad():
        for parameter in (*model.parameters(), *loaded.parameters()):
            parameter.zero_()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_no_transformers_and_no_algebra(llama: Path) -> None:
    """Reading a model imports neither transformers nor (through torch's meta device) sympy: seconds of
    waiting."""
    code = "import sys; from chatwright.interop.hf import load_hf; load_hf(sys.argv[1]); "
    code += "print([name for name in ('transformers', 'sympy', 'huggingface_hub') if name in sys.modules])"
    done = run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


REFUSED = [
    (LLAMA, {"model_type": "mamba"}, "'mamba' are not supported"),
    (LLAMA, {"model_type": None}, "None are not supported"),
    (LLAMA, {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    (LLAMA, {"attention_bias": True}, "attention_bias = true"),
    (ARCEE, {"hidden_act": "silu"}, 'hidden_act = "silu" is not supported, only "relu2"'),
    (ARCEE, {"mlp_bias": True}, "mlp_bias = true"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = true"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor must be a number, not null",
    ),
    (LLAMA, {"rope_scaling": {"type": "linear", "fctor": 2.0}}, "rotary setting 'fctor' is not supported"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "factor must be a number, not null",
    ),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "numbers of rope_scaling must be positive"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling of type 'dynamic'"),
    (LLAMA, {"rope_scaling": {"type": ["su"], "factor": 2.0}}, 'scaling of type ["su"]'),
    (
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "'full_attention' is not supported",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    (LLAMA, {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    (LLAMA, {"rope_parameters": 7}, "rope_parameters must be an object"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantised safetensors"),
    (LLAMA, {"hidden_size": "16"}, 'hidden_size must be a positive whole number, not "16"'),
    (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, not 0"),
    (LLAMA, {"num_hidden_layers": 10**9}, "1000000000 blocks in the configuration"),
    (LLAMA, {"vocab_size": None}, "vocab_size must be a positive whole number, not null"),
    (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    (LLAMA, {"num_key_value_heads": 3}, "not a multiple of kv_heads 3"),
    (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is not true"),
    (QWEN3, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = "),
    (QWEN3, {"use_sliding_window": 1.5}, "use_sliding_window = 1.5"),
    (GPT2, {"activation_function": "relu"}, 'activation_function = "relu"'),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = false"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention = true"),
    (GPT1, {"afn": "silu"}, 'afn = "silu"'),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, base)
    load_hf(tmp_path)  # without the change it is fine
    (tmp_path / "config.json").write_text(json.dumps({**base, **change}))
    assert message in error_of(tmp_path)


@pytest.mark.parametrize(
    ("base", "change", "field", "value"),
    [
        (LLAMA, {"rope_theta": 5e5}, "rope_base", 5e5),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope_base", 2e4),
        (LLAMA, {"rope_scaling": None}, "rope_base", 1e4),
        (LLAMA, {"head_dim": None}, "head_dim", 8),
        (LLAMA, {"num_key_value_heads": None}, "kv_heads", 2),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 2}, "qk_norm", True),
        (QWEN3, {"use_sliding_window": False, "sliding_window": 4}, "windows", ()),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 1}, "windows", (0, 4096)),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4}, "windows", (4, 4)),
        (QWEN3, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, "windows", ()),
        (GPT2, {"n_inner": 40}, "mlp_width", 40),
        (GPT2, {"activation_function": "gelu"}, "activation", "gelu"),
        (GPT2, {"activation_function": "gelu_pytorch_tanh"}, "activation", "gelu_tanh"),
        (GPT2, {"reorder_and_upcast_attn": True}, "mlp_width", 64),
        (GPT2, {"attn_pdrop": 0.3}, "dropout", 0.3),
        (GPT1, {}, "pre_norm", False),
    ],
)
def test_settings(base: dict[str, Any], change: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(config_from_hf({**base, **change}), field) == value


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.norm.weight"] = torch.zeros(17)
    message = error_of(save(tmp_path, LLAMA, tensors))
    assert "missing tensors: model.layers.1.mlp.up_proj.weight;" in message
    assert "no place for: model.layers.0.self_attn.q_proj.bias;" in message
    assert message.endswith("wrong shape: model.norm.weight (17, not 16)")


def test_a_transposed_matrix_is_noticed(tmp_path: Path) -> None:
    tensors = tensors_of(GPT2)
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = tensors[name].T.contiguous()
    assert f"{name} (48 x 16, not 16 x 48)" in error_of(save(tmp_path, GPT2, tensors))


def test_many_problems_stay_one_line(tmp_path: Path) -> None:
    message = error_of(save(tmp_path, LLAMA, {f"blob.{number}": torch.zeros(1) for number in range(50)}))
    assert "blob.0, blob.1, blob.10, blob.11 and 46 more" in message


def test_old_constants_are_passed_over(tmp_path: Path) -> None:
    """Causal masks and rotary frequencies, which old versions saved, follow from the configuration."""
    tensors = tensors_of(GPT2)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    loaded = load_hf(save(tmp_path, GPT2, tensors))
    weight = tensors["transformer.wte.weight"]
    assert torch.equal(loaded.model.embed.weight[: len(weight)], weight)
    tensors = tensors_of(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    loaded = load_hf(save(tmp_path, LLAMA, tensors))
    weight = tensors["model.embed_tokens.weight"]
    assert torch.equal(loaded.model.embed.weight[: len(weight)], weight)


def test_a_second_output_matrix(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    load_hf(save(tmp_path, LLAMA, tensors))
    tensors["lm_head.weight"][0, 0] += 1
    assert "says tie_word_embeddings, but lm_head.weight differs" in error_of(save(tmp_path, LLAMA, tensors))
    untied = load_hf(save(tmp_path, {**LLAMA, "tie_word_embeddings": False}, tensors)).model
    assert torch.equal(untied.head.weight, tensors["lm_head.weight"])
    del tensors["lm_head.weight"]
    save(tmp_path, {**LLAMA, "tie_word_embeddings": False}, tensors)
    assert "missing tensors: lm_head.weight" in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(llama: Path, size: int) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert "damaged or cut short" in error_of(llama)
    file.write_bytes(data)
    load_hf(llama)


def test_pickles_are_never_opened(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no model.safetensors" in error_of(llama)
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = error_of(llama)
    assert "pytorch_model.bin" in message
    assert "safe_serialization=True" in message


def test_shards(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    expected = load_hf(llama).model.state_dict()
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, llama / file)
    index = llama / "model.safetensors.index.json"
    places = {name: file for file, part in halves.items() for name in part}
    index.write_text(json.dumps({"weight_map": places}))
    found = load_hf(llama).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (llama / "b.safetensors").rename(llama / "c.safetensors")
    assert "b.safetensors does not exist" in error_of(llama)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../a.safetensors")}))
    assert "'../a.safetensors' is not the name of a file beside it" in error_of(llama)
    index.write_text("{}")
    assert "no weight_map" in error_of(llama)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("[]", "expected an object"),
        ("\udcff", "cannot be read"),
    ],
)
def test_broken_config(llama: Path, content: str | None, message: str) -> None:
    file = llama / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert message in error_of(llama)


def test_not_a_directory(tmp_path: Path) -> None:
    assert "is not a directory" in error_of(tmp_path / "none")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, the dog sat on the log"] * 20, 290)


def test_tokenizer_and_template(llama: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(llama)
    loaded = load_hf(llama)
    assert loaded.template is None
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    assert load_hf(llama, tokenizer=False).tokenizer is None
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    settings: dict[str, Any] = {"eos_token": {"content": "<|end|>"}, "chat_template": source}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    template = load_hf(llama).template
    assert template is not None
    assert template.end == "<|end|>"
    assert template.render([{"role": "user", "content": "hi"}]) == "<|user|>hi<|end|>"
    # Several by name: the default one; and a file of its own comes first.
    settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_hf(llama).template == template
    (llama / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]<|end|>{% endfor %}")
    own = load_hf(llama).template
    assert own is not None
    assert own.render([{"role": "user", "content": "hi"}]) == "[hi]<|end|>"


def test_tokenizer_that_does_not_fit(llama: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(llama)
    file = llama / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "decoder": {"type": "WordPiece", "prefix": "#"}}))
    assert "its decoder 'WordPiece' is not supported" in error_of(llama)
    file.write_text(json.dumps({**content, "decoder": None}))
    assert "it has no decoder" in error_of(llama)
    load_hf(llama, tokenizer=False)
    file.write_text(json.dumps(content))
    save(llama, {**LLAMA, "vocab_size": 270})
    assert f"{tokenizer.vocab_size} tokens in tokenizer.json, 270 in the model" in error_of(llama)


def test_hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_hub("owner/name", revision="v1")
    assert loaded.source == "hf:owner/name"
    assert loaded.model.config == GPTConfig.from_dict(loaded.model.config.to_dict())
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert not any(pattern.endswith(("bin", "pt", "py")) for pattern in asked["allow_patterns"])


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/name", "not a name", "owner/name/more"):
        with pytest.raises(UserError) as caught:
            load_hub(name)
        assert str(caught.value).startswith(f"hf:{name} cannot be fetched: ")
        assert "\n" not in str(caught.value)
