"""`chatwright doctor`'s checks of a model: files, weights, tokenizer; chat.py has those of its template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch

from chatwright import runtime
from chatwright.checkpoint import newest_valid
from chatwright.commands.doctor.chat import check_chat
from chatwright.commands.doctor.export import check_export
from chatwright.commands.doctor.finding import Finding
from chatwright.commands.doctor.machine import check_machine
from chatwright.commands.doctor.text import check_text
from chatwright.config import UserError
from chatwright.files import read_json
from chatwright.generate.engine import Engine
from chatwright.generate.request import Request
from chatwright.generate.sampling import Sampling
from chatwright.language_model import find_checkpoint, load_parts
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

    from chatwright.interop.loaded import Loaded

PROBES = (
    "Plain text, don't worry.\n\tIndented\r\n  twice",
    "naïve café — 東京 🙂 \u200b עברית",
    "half a pair \ud83d of surrogates",
)
NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that never occur in UTF-8; a vocabulary learnt from text may lack them."""
OWN_TABLE = frozenset({"positions.weight"})
THEIR_TABLES = frozenset(
    {"wpe.weight", "transformer.wpe.weight", "positions_embed.weight", "transformer.positions_embed.weight"}
)
"""Names of the table of learned positions in files: above in ours, here those of GPT-2 and GPT-1 in
transformers' format."""


def check_model(name: str, dialogue: str = "") -> tuple[list[Finding], Text | None]:
    """Findings about a model, and the loss mask of a conversation (the first of `dialogue`, else a
    sample)."""
    findings = list(_files(name))
    try:
        parts = load_parts(name)
    except UserError as error:
        if not Path(name).exists():
            raise
        return [
            *findings,
            _positions(name)
            or Finding("problem", "model", str(error), "name another one, or have it made or copied anew"),
        ], None
    findings += [*_numbers(parts.model), *check_machine(parts.model)]
    if parts.tokenizer is None:
        return [
            *findings,
            Finding(
                "problem",
                "tokenizer",
                "there is none beside the weights",
                "put the tokenizer.json that it was trained with beside them",
            ),
        ], None
    findings += [*_tokenizer(parts, name), *check_text(parts, name)]
    findings += [_context(parts.model), _generation(parts.model, parts.tokenizer)]
    picture: Text | None = None
    if parts.template is None:
        findings.append(Finding("ok", "template", "none: a base model (chatwright generate; chatwright sft)"))
    else:
        found, picture = check_chat(parts.model, parts.tokenizer, parts.template, dialogue)
        findings += found
    return [*findings, *check_export(parts, name)], picture


def _files(name: str) -> Iterator[Finding]:
    """Checksums of one of our checkpoints, and newer checkpoints skipped because they are damaged."""
    path = Path(name)
    if not path.is_dir():
        return
    complaints = newest_valid(path / "checkpoints")[1]
    for complaint in complaints:
        yield Finding(
            "warning", "files", complaint, "an older checkpoint is used; delete this one or train again"
        )
    try:
        found = find_checkpoint(path)
        if found is not None:
            found.verify()
            count = len(found.state().get("files", {}))
            yield Finding("ok", "files", f"{found.path}: {count} files pass their checksums")
    except UserError as error:
        yield Finding("problem", "files", str(error), "copy the directory again from where it was whole")


def _numbers(model: GPT) -> Iterator[Finding]:
    """The number of parameters, and whether all are finite."""
    count, body = model.parameter_count(), model.parameter_count(embeddings=False)
    shape = model.config
    yield Finding(
        "ok",
        "model",
        f"{count:,} parameters ({count - body:,} in tables of tokens and positions), {shape.layers} layers, "
        f"width {shape.width}, {shape.heads} heads, {shape.position} positions",
    )
    broken = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if broken:
        yield Finding(
            "problem",
            "weights",
            f"not finite in {', '.join(broken[:3])} ({len(broken)} tensors)",
            "its training diverged: go back to an earlier checkpoint, lower the learning rate",
        )


def _tokenizer(parts: Loaded, name: str) -> Iterator[Finding]:
    """Whether the tokenizer belongs to the model, and whether decoding gives the encoded text back."""
    tokenizer, padded = parts.tokenizer, parts.model.config.vocab_size
    assert tokenizer is not None
    found = find_checkpoint(Path(name)) if Path(name).is_dir() else None
    recorded = found.state().get("tokenizer") if found is not None else None
    text = f"{tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}"
    if tokenizer.vocab_size > padded:
        yield Finding(
            "problem",
            "tokenizer",
            f"{text}, but the model has a table of {padded:,}",
            "they do not belong together: put the model's own tokenizer.json there",
        )
    elif recorded not in (None, tokenizer.fingerprint):
        yield Finding(
            "problem",
            "tokenizer",
            f"{text}, but the model was trained with {recorded}",
            "put the tokenizer.json of its training there",
        )
    else:
        extra = (
            f", {padded - tokenizer.vocab_size} rows of the model unused"
            if padded > tokenizer.vocab_size
            else ""
        )
        yield Finding(
            "ok", "tokenizer", f"{text}, {len(tokenizer.control_ids)} of them control tokens{extra}"
        )
    yield _round_trip(tokenizer)
    spelled = "".join(tokenizer.controls)
    if set(tokenizer.encode(spelled)) & set(tokenizer.control_ids.values()):
        yield Finding(
            "problem",
            "controls",
            "text that spells a control token becomes one",
            "users could fake turns of others: do not serve this model; check `special` in tokenizer.json",
        )
    else:
        yield Finding("ok", "controls", "text that spells a control token stays text")


def _round_trip(tokenizer: Tokenizer) -> Finding:
    def same(probe: str | bytes) -> bool:
        data = probe if isinstance(probe, bytes) else probe.encode("utf-8", errors="surrogatepass")
        try:
            return tokenizer.decode_bytes(tokenizer.encode(probe)) == data
        except UserError:
            return False

    for probe in PROBES:
        if not same(probe):
            return Finding(
                "warning",
                "round trip",
                f"{probe[:40]!r} does not come back as it went in",
                "its normaliser changes text, or bytes are missing: such texts reach the model otherwise",
            )
    lost = {byte for byte in range(256) if not same(bytes([byte]))}
    if not lost:
        return Finding(
            "ok", "round trip", "text in several scripts, and all 256 bytes, come back as they went in"
        )
    if lost <= NEVER:
        return Finding(
            "ok", "round trip", f"text comes back as it went in; {len(lost)} bytes that no text has are lost"
        )
    return Finding(
        "warning",
        "round trip",
        f"{len(lost)} of 256 bytes do not come back, {min(lost):#04x} among them",
        "texts that hold them reach the model without them; harmless where these are rare control characters",
    )


def _positions(name: str) -> Finding | None:
    """The finding for a model that cannot be loaded because its context differs from the length of its table
    of positions; None for other models."""
    path = Path(name)
    with suppress(UserError, OSError, safetensors.SafetensorError, TypeError, ValueError):
        found = find_checkpoint(path) if path.is_dir() else None
        if found is not None:
            file, said, names = (
                found.path / "model.safetensors",
                found.state()["model"].get("context"),
                OWN_TABLE,
            )
        else:
            values = read_json(path / "config.json")
            file, said, names = path / "model.safetensors", values.get("n_positions"), THEIR_TABLES
        with safetensors.safe_open(str(file), framework="pt") as tensors:
            tables = [key for key in tensors.keys() if key in names]  # noqa: SIM118 (not a dict)
            rows = [tensors.get_slice(key).get_shape()[0] for key in tables]
        if rows and said is not None and rows[0] != said:
            return Finding(
                "problem",
                "context",
                f"{said:,} tokens, but {rows[0]:,} positions in the table",
                f"set the context to {rows[0]} in {'state.json' if found else 'config.json (n_positions)'}",
            )
    return None


def _context(model: GPT) -> Finding:
    """Whether the last position of the context works."""
    shape = model.config
    rows = model.positions.num_embeddings if model.positions is not None else None
    if rows is not None and rows != shape.context:
        return Finding(
            "problem",
            "context",
            f"{shape.context:,} tokens, but {rows:,} positions in the table",
            f"set `context` to {rows} in state.json or config.json",
        )
    last = torch.tensor([[max(0, shape.context - 2), shape.context - 1]], device=model.embed.weight.device)
    with runtime.evaluating(model):
        finite = bool(torch.isfinite(model(torch.zeros_like(last), positions=last)).all())
    if not finite:
        return Finding(
            "problem",
            "context",
            f"the logits at position {shape.context - 1:,} are not finite",
            "the weights or the settings of the positions are damaged",
        )
    kind = f"{rows:,} positions in the table" if rows is not None else f"{shape.position} positions, no table"
    return Finding("ok", "context", f"{shape.context:,} tokens; {kind}; the last one gives finite logits")


def _generation(model: GPT, tokenizer: Tokenizer) -> Finding:
    """Whether the engine (token by token, with a cache) has the probabilities of one forward pass."""
    prompt = tokenizer.encode_text("Once upon a time")
    request = Request(tuple(prompt), Sampling(max_new_tokens=12, temperature=0.0))
    try:
        done = Engine(model, tokenizer).generate([request])[0]
    except UserError as error:
        return Finding("problem", "generation", str(error), "see the findings above")
    ids = torch.tensor([[*prompt, *done.ids]], device=model.embed.weight.device)
    with runtime.evaluating(model):
        whole = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
    apart = (
        (whole.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu() - torch.tensor(done.logprobs)).abs().max()
    )
    if (
        not apart <= 1e-3
    ):  # float32 sums in another order differ by less than 1e-4 (tests/generate); NaN fails
        return Finding(
            "problem",
            "generation",
            f"with and without the cache log-probabilities differ by {apart:.2g}",
            "this is a fault of the program: please report it with this model's name",
        )
    return Finding(
        "ok", "generation", f"12 tokens with the cache and without agree (within {apart:.1g} nats)"
    )
