"""The doctor's checks of a chat template: its end token, its loss mask, its ids in other programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import tokenizers
import torch

from chatwright import runtime
from chatwright.chat import ChatTemplate, EncodedChat, Message
from chatwright.commands.doctor.finding import Finding
from chatwright.config import UserError
from chatwright.data.picture import mask_picture, spelled
from chatwright.messages import written
from chatwright.metrics import console
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from chatwright.turn_ends import TurnEnds

if TYPE_CHECKING:
    from rich.text import Text

SAMPLE = (
    Message(role="system", content="You are kind and brief."),
    Message(role="user", content="Hi! What is 2 + 2?"),
    Message(role="assistant", content="It is 4."),
    Message(role="user", content="Thanks! Spell <|end|> for me."),
    Message(role="assistant", content="Sure: the letters e, n, d."),
)
DIALOGUES = 1_000
"""Most of the user's conversations that are counted."""


def check_chat(
    model: GPT, tokenizer: Tokenizer, template: ChatTemplate, dialogue: str
) -> tuple[list[Finding], Text | None]:
    """Findings about the chat template: its end token, its loss mask, and its ids in other programs."""
    ends = template.ends(tokenizer)
    findings = [_ends(template, tokenizer)]
    if findings[0].level == "problem":
        return findings, None
    messages: Sequence[Message] = SAMPLE
    try:
        try:
            encoded = template.encode(messages, tokenizer)
        except UserError:  # some templates have no system role
            messages = SAMPLE[1:]
            encoded = template.encode(messages, tokenizer)
            findings.append(
                Finding(
                    "warning",
                    "system",
                    "the template refuses system messages",
                    "leave the system prompt empty with this model",
                )
            )
        findings += [
            _end_learnt(encoded, ends, tokenizer),
            _prefix(messages, template, tokenizer),
            _twin(messages, template, tokenizer),
            *([_stops(model, encoded, template, tokenizer)] if ends.tokens else []),
        ]
        if dialogue:
            finding, encoded = _dialogues(dialogue, template, tokenizer, model.config.context)
            findings.append(finding)
    except UserError as error:
        return [
            *findings,
            Finding("problem", "template", str(error), "use the template that came with the model"),
        ], None
    return findings, mask_picture(encoded, tokenizer, end=ends.last, colours=console.is_terminal)


def _ends(template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """What ends a turn."""
    ends = template.ends(tokenizer)
    others = f", others: {', '.join(sorted(template.named))}" if template.named else ""
    told = f"hash {template.fingerprint}{others}, it writes {_known(template)}, an assistant's turn ends with"
    if ends.tokens:
        return Finding("ok", "template", f"{told} {' or '.join(ends.tokens)}")
    if not ends.last:
        return Finding(
            "warning",
            "template",
            f"{told} nothing: an answer ends at {tokenizer.end_of_text} alone",
            "it can be talked to, but not trained: sft wants a template that ends turns",
        )
    if re.fullmatch(r"<\S+>", ends.last):
        return Finding(
            "problem",
            "template",
            f"it ends turns with {ends.last}, which is no control token",
            "the model cannot stop: use the tokenizer and the template of the same model",
        )
    return Finding("ok", "template", f"{told} the text {ends.last!r}, at which an answer is cut")


def _known(template: ChatTemplate) -> str:
    """What the template has a form of its own for, beside texts."""
    able = template.abilities
    forms = (("tools", able.tools), ("tool calls", able.calls), ("thinking", able.thinking))
    return ", ".join(name for name, can in forms if can) or "texts alone"


def _end_learnt(encoded: EncodedChat, ends: TurnEnds, tokenizer: Tokenizer) -> Finding:
    if encoded.doubt:
        return Finding(
            "problem",
            "loss mask",
            encoded.doubt,
            "sft would refuse it: put {% generation %} around what the assistant writes in the template",
        )
    learnt = [token for token, flag in zip(encoded.ids, encoded.mask, strict=True) if flag]
    text = spelled(learnt, tokenizer)
    found = sum(text.count(end) for end in ends.texts)
    if found != 2 and ends.texts:
        return Finding(
            "problem",
            "loss mask",
            f"{found} of 2 answers have their end token {ends.last} inside the loss",
            "a model trained so would never stop: correct the chat template",
        )
    share = 100 * sum(encoded.mask) / len(encoded.mask)
    return Finding("ok", "loss mask", f"answers and their end tokens, {share:.0f} % of the sample's tokens")


def _prefix(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """Whether a prompt equals the beginning of the conversations that the model learnt from."""
    asked = template.encode(messages[:-1], tokenizer, add_generation_prompt=True).ids
    if template.encode(messages, tokenizer).ids[: len(asked)] != asked:
        return Finding(
            "warning",
            "prompt",
            "a prompt is written otherwise than the conversations that are learnt from",
            "answers may be worse than the loss says: see `add_generation_prompt` in the template",
        )
    return Finding("ok", "prompt", "a prompt is the beginning of the conversation with its answer")


def _twin(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """Whether programs that tokenize the rendered text (transformers, vLLM) get our text and our ids."""
    others = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    harmless_ones = [
        Message(role=one["role"], content=written(one["content"]).replace("<|end|>", "the end"))
        for one in messages
    ]
    text = template.render(harmless_ones)
    theirs, version = _theirs(harmless_ones, template)
    if theirs is not None and theirs != text:
        return Finding(
            "problem",
            "elsewhere",
            f"the sample is {text!r} here, and {theirs!r} in transformers {version}",
            "this is a fault of the program: please report it with this model's name",
        )
    if others.encode(text, add_special_tokens=False).ids != template.encode(harmless_ones, tokenizer).ids:
        return Finding(
            "warning",
            "elsewhere",
            "programs that tokenize the rendered text get other ids (transformers, vLLM)",
            "its control tokens are no special tokens of the tokenizer; quality may differ a little",
        )
    compared = f" (compared with transformers {version})" if version else ""
    return Finding(
        "ok",
        "elsewhere",
        f"transformers and vLLM get the same text and ids for the sample{compared}: {text!r}",
    )


def _theirs(messages: Sequence[Message], template: ChatTemplate) -> tuple[str | None, str]:
    """The sample as transformers renders it, and its version; (None, "") where it is not installed."""
    if find_spec("transformers") is None:
        return None, ""
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    version = str(transformers.__version__)
    render: Any = render_jinja_template  # its annotations are incomplete
    try:
        texts, _ = render([[dict(one) for one in messages]], chat_template=template.source)
    except Exception as error:  # the template's own, Jinja's, or the library's
        return f"an error: {' '.join(str(error).split())[:200]}", version
    return str(texts[0]), version


def _stops(model: GPT, encoded: EncodedChat, template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """The probability of the end token at the end of the sample's answers."""
    end = template.end_id(tokenizer)
    if len(encoded.ids) > model.config.context:
        return Finding(
            "warning",
            "stopping",
            f"the sample has {len(encoded.ids)} tokens, the context {model.config.context}",
            "conversations need a longer context",
        )
    ids = torch.tensor([encoded.ids], device=model.embed.weight.device)
    places = [n for n, token in enumerate(encoded.ids) if token == end and encoded.mask[n]]
    with runtime.evaluating(model):
        likely = model(ids)[0].softmax(-1)[[n - 1 for n in places], end].max().item()
    text = f"after a whole answer the end token has probability {likely:.2g}"
    if likely < 2 / tokenizer.vocab_size:
        return Finding(
            "warning",
            "stopping",
            f"{text}: it has not learnt to stop",
            "train it on conversations (chatwright sft); check that its tokenizer and template are its own",
        )
    return Finding("ok", "stopping", text)


def _dialogues(
    spec: str, template: ChatTemplate, tokenizer: Tokenizer, context: int
) -> tuple[Finding, EncodedChat]:
    """The user's conversations: how many would be cut or have no answer, and the first one encoded."""
    from chatwright.data import sources

    encoded = [template.encode(one.messages, tokenizer) for one in islice(sources.dialogues(spec), DIALOGUES)]
    long = sum(len(one.ids) > context for one in encoded)
    silent = sum(not any(one.mask) for one in encoded)
    share = 100 * sum(sum(one.mask) for one in encoded) / sum(len(one.ids) for one in encoded)
    text = f"{len(encoded):,} conversations, {share:.0f} % of their tokens are learnt"
    if long or silent:
        return Finding(
            "problem" if silent == len(encoded) else "warning",
            "dialogues",
            f"{text}; {long} are longer than the context of {context:,}, {silent} have no answer",
            "long ones are cut between exchanges, those without an answer are left out",
        ), encoded[0]
    return Finding("ok", "dialogues", text), encoded[0]
