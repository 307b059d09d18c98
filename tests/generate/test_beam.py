"""Beam search against transformers' `generate` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from chatwright.config import UserError
from chatwright.generate.beam import beam_search
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT

CONTEXT = 48


def llama(seed: int, vocab_size: int) -> tuple[GPT, Any]:
    """Ours and theirs, the same weights."""
    torch.manual_seed(seed)
    theirs: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-6,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
    )
    theirs.eval()
    config = GPTConfig.preset(
        "modern-nano", vocab_size=vocab_size, context=CONTEXT, width=32, heads=4, kv_heads=2, mlp_width=48
    )
    ours = GPT(
        GPTConfig.from_dict({**config.to_dict(), "head_dim": 8, "qk_norm": False, "tied": False})
    ).eval()
    names = {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    weights, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        block, module, kind = split(name)
        state[name] = weights[f"{f'model.layers.{block}.' if block else ''}{names[module]}.{kind}"]
    ours.load_state_dict(state)
    return ours, theirs


def gpt2(seed: int, vocab_size: int) -> tuple[GPT, Any]:
    """Ours and theirs, the same weights; theirs are transposed, and q, k, v stand in one matrix."""
    torch.manual_seed(seed)
    theirs: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=CONTEXT,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.eval()
    ours = GPT(GPTConfig(vocab_size=vocab_size, context=CONTEXT, layers=2, width=32, heads=4)).eval()
    names = {
        "embed": "wte",
        "positions": "wpe",
        "head": "wte",
        "final_norm": "ln_f",
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.output": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        **{f"attention.{part}": "attn.c_attn" for part in ("query", "key", "value")},
    }
    weights, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        block, module, kind = split(name)
        tensor = weights[f"transformer.{f'h.{block}.' if block else ''}{names[module]}.{kind}"]
        if kind == "weight" and module.startswith(("attention.", "mlp.")):
            tensor = tensor.T
        if names[module] == "attn.c_attn":
            tensor = tensor.chunk(3)[("query", "key", "value").index(module.removeprefix("attention."))]
        state[name] = tensor
    ours.load_state_dict(state)
    return ours, theirs


def split(name: str) -> tuple[str, str, str]:
    """`blocks.1.mlp.up.weight` -> 1, mlp.up, weight."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return "", module, kind
    block, _, module = module.removeprefix("blocks.").partition(".")
    return block, module, kind


def compare(
    pair: tuple[GPT, Any], prompt: list[int], end_ids: list[int], new: int, **options: Any
) -> set[int]:
    """Check one search; returns the lengths of the answers."""
    ours, theirs = pair
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=options["beams"],
        num_return_sequences=options["beams"],
        length_penalty=options["length_penalty"],
        early_stopping=options["early_stopping"],
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=end_ids or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    got = beam_search(ours, prompt, max_new_tokens=new, end_ids=end_ids, **options)
    assert len(got) == options["beams"]
    for (ids, score), row, their_score in zip(
        got, expected.sequences, expected.sequences_scores, strict=True
    ):
        answer = row[len(prompt) :].tolist()
        assert ids == answer[: len(ids)]
        assert set(answer[len(ids) :]) <= {0, *end_ids[:1]}  # padding
        assert len(ids) == new or ids[-1] in end_ids
        assert not set(ids[:-1]) & set(end_ids)
        assert score == pytest.approx(float(their_score), abs=1e-4)
    assert [score for _, score in got] == sorted((score for _, score in got), reverse=True)
    return {len(ids) for ids, _ in got}


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_equals_transformers(make: Any, early_stopping: bool) -> None:
    lengths: set[int] = set()
    for seed, beams, length_penalty in [
        (0, 2, 1.0),
        (1, 3, 0.5),
        (2, 5, 2.0),
        (3, 4, 1.3),
        (4, 3, 2.0),
        (5, 5, 0.5),
    ]:
        pair = make(seed, 40)
        prompt = [1 + (seed * 7 + step * 5) % 39 for step in range(3 + seed)]
        for end_ids in ([], [9], [4, 9, 17]):
            lengths |= compare(
                pair,
                prompt,
                end_ids,
                12,
                beams=beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
    assert len(lengths) > 4  # answers ended early, late and not at all


def test_length_penalty_and_early_stopping_change_something() -> None:
    ours, _ = llama(3, 40)
    options: dict[str, Any] = {"beams": 4, "max_new_tokens": 12, "end_ids": [4, 9, 17, 20]}
    plain = beam_search(ours, [1, 2, 3], **options)
    long = beam_search(ours, [1, 2, 3], length_penalty=3.0, **options)
    assert sum(len(ids) for ids, _ in long) > sum(len(ids) for ids, _ in plain)
    results = []
    for early_stopping in (False, True):
        results.append(
            beam_search(ours, [1, 2, 3], early_stopping=early_stopping, length_penalty=0.5, **options)
        )
    assert results[0] != results[1]


def test_one_beam_is_greedy_and_the_model_is_left_as_it_was() -> None:
    ours, _ = gpt2(0, 40)
    ours.train()
    ours.blocks[0].eval()
    modes = [module.training for module in ours.modules()]
    (ids, score) = beam_search(ours, [1, 2, 3], beams=1, max_new_tokens=6, length_penalty=0.0)[0]
    assert [module.training for module in ours.modules()] == modes
    sequence, total = [1, 2, 3], 0.0
    for _ in range(6):
        logprobs = ours.eval()(torch.tensor([sequence]))[0, -1].log_softmax(-1)
        total += logprobs.max().item()
        sequence.append(int(logprobs.argmax()))
    assert ids == sequence[3:]
    assert score == pytest.approx(total, abs=1e-4)


def test_the_context_ends_an_answer_and_nonsense_is_refused() -> None:
    ours, _ = gpt2(0, 40)
    got = beam_search(ours, [1] * (CONTEXT - 3), beams=3, max_new_tokens=50)
    assert [len(ids) for ids, _ in got] == [3, 3, 3]
    for options in ({"beams": 0}, {"max_new_tokens": 0}, {"length_penalty": float("nan")}):
        with pytest.raises(UserError, match="beam search"):
            beam_search(ours, [1], **{"beams": 2, "max_new_tokens": 5, **options})  # type: ignore[arg-type]
    for prompt in ([], [1] * CONTEXT):
        with pytest.raises(UserError, match="the prompt has"):
            beam_search(ours, prompt, beams=2, max_new_tokens=5)
