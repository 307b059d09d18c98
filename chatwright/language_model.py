"""`LanguageModel`: a model with its tokenizer and template, ready for use. `chatwright.load` returns one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chatwright import checkpoint, files, runtime
from chatwright.chat import Beside, ChatTemplate, FittedChat, Message, beside_of, fit_context
from chatwright.config import UserError
from chatwright.generate.engine import Engine
from chatwright.generate.request import Alternatives, Completion, Piece, Request
from chatwright.generate.runner import Runner
from chatwright.generate.sampling import sampling_from
from chatwright.generate.scoring import ToScore, score_texts
from chatwright.generate.sequence import tokens_with_text
from chatwright.generation_config import GenerationConfig, chat_options
from chatwright.interop.adapter_origin import FOLDER, is_adapter
from chatwright.interop.loaded import Loaded, located
from chatwright.interop.peft import load_peft
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.lora import merge, plain, sharing_copy
from chatwright.model_names import is_pair, near_hub, split_pair, unfinished_stages
from chatwright.text_frame import TextFrame
from chatwright.tokenizer import Tokenizer

DTYPES = ("auto", "fp32", "bf16", "int8", "int4")
"""Types of the weights for generation; see `make_runner`."""
WORTH_COMPILING = 20_000_000
"""Least parameters for which `auto` uses the CPU kernels: smaller models are fast anyway, and then exact."""
WORTH_COPYING = 2_000_000
"""Least parameters for which `exact_runner` uses them, for many answers at once."""

SMOLLM2_SAMPLING = GenerationConfig(temperature=0.2, top_p=0.9, source="the example of its makers")
"""SmolLM2's settings. Its file says nothing about sampling; these are those of the model card's example
(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)."""


def make_runner(model: GPT, dtype: str) -> Runner | None:
    """The engine's runner for a dtype; None is the model itself, in its own precision.

    On a CPU a named dtype means the compiled kernels with weights of that type. `auto` means bf16 kernels for
    large enough models whose shape the kernels support. Raises UserError when a named dtype is not possible.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if next(model.parameters()).device.type != "cpu":
        if dtype in ("int8", "int4"):
            raise UserError(f"{dtype} weights are for CPUs; on a GPU take bf16 or fp32")
        if dtype == "bf16":
            model.bfloat16()
        return None
    if dtype == "auto":
        from chatwright.generate.shapes import unsupported

        if model.parameter_count() < WORTH_COMPILING or unsupported(model.config):
            return None
        dtype = "bf16"
    from chatwright.generate.kernels import KernelRunner

    return KernelRunner(model, dtype)


def exact_runner(model: GPT, dtype: torch.dtype = torch.float32) -> Runner | None:
    """The fastest runner whose log-probabilities are the model's up to rounding: that of float32, or, with
    `dtype` bfloat16, that of bfloat16 products. None is the model itself.

    It computes with a copy of the current weights: make a new one after each training step.
    """
    from chatwright.generate.shapes import unsupported

    first = next(model.parameters())
    small = model.parameter_count() < WORTH_COPYING
    if first.device.type != "cpu" or first.dtype != torch.float32 or small or unsupported(model.config):
        return None
    return make_runner(model, "bf16" if dtype == torch.bfloat16 else "fp32")


class LanguageModel:
    """A GPT that speaks text. Sampling options are those of `chatwright.generate.sampling.Sampling`. Those
    that are not given are the model's own (`generation_config.json`); where it has none, the temperature is
    0.7 (chatwright/generation_config.py)."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        name: str,
        *,
        dtype: str = "auto",
        generation: GenerationConfig | None = None,
        source: str = "",
    ) -> None:
        """`generation` are the model's own sampling settings, used where the caller gives none."""
        if model.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model, self.tokenizer, self.template, self.name = model.eval(), tokenizer, template, name
        self.dtype, self.generation = dtype, generation
        self.source = source or name
        """Where it was found, such as the directory of a checkpoint."""

    @cached_property
    def engine(self) -> Engine:
        """The engine for all generation; made when first used. Raises UserError as `make_runner`.

        Weights are packed for it once: after training `model`, make a new LanguageModel.
        """
        return Engine(self.model, self.tokenizer, runner=make_runner(self.model, self.dtype))

    def with_adapter(self, directory: str | Path, name: str | None = None) -> LanguageModel:
        """A new model: this one with a LoRA adapter (a directory in PEFT's format). This one does not change.

        Both share the parameters without an adapter. Matrices with one are merged into new ones, so that
        generation costs the same as without. `chatwright.model.lora.use_adapter` changes the adapter of a
        model in place. Raises UserError as `load_peft`.
        """
        twin = sharing_copy(self.model)
        load_peft(adapter_directory(Path(directory)), twin)
        name = name or f"{self.name}+{directory}"
        return LanguageModel(
            plain(twin), self.tokenizer, self.template, name, dtype=self.dtype, generation=self.generation
        )

    @property
    def own_sampling(self) -> dict[str, Any]:
        """The sampling settings that hold where nothing else is asked for, by name: those that the model's
        makers recommend; a temperature of 0.7 where they say none."""
        return chat_options(self.generation)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer, in a chat and in a text: all that the tokenizer, the makers' settings and
        the chat template name. Raises UserError for a template whose end the tokenizer does not know."""
        own = self.tokenizer.end_ids
        return own if self.template is None else own | self.template.end_ids(self.tokenizer)

    @cached_property
    def known(self) -> Bool[Tensor, " V"] | None:
        """True for the rows of the model's table that a token has; None where all have one."""
        return tokens_with_text(self.tokenizer, self.model.config.vocab_size)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the model takes in use: parameters, weights packed for the engine, keys and values."""
        parameters = sum(one.nbytes for one in self.model.parameters())  # tied ones count once
        return parameters + self.engine.runner.weight_bytes() + self.engine.cache_bytes

    def logits(self, ids: Sequence[Sequence[int]] | Tensor) -> Float[Tensor, "batch time vocab"]:
        """Logits (float32) of the token after each position; rows of equal length."""
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=next(self.model.parameters()).device)
        with runtime.evaluating(self.model):
            return self.model(tokens)  # type: ignore[no-any-return]

    def score(self, ids: Sequence[int], *, top: int = 0) -> list[tuple[int, float | None, Alternatives]]:
        """For each token of a text: (token, log-probability in nats given the tokens before, the `top`
        likeliest tokens).

        The first token has no log-probability: nothing precedes it. Raises UserError for a text beyond the
        context.
        """
        return score_texts(self.model, [ToScore(ids, top)], self.known)[0].tokens if ids else []

    def embed(self, ids: Sequence[int]) -> Float[Tensor, " width"]:
        """A text as a vector of length 1: the mean of the final hidden states of its tokens.

        A language model was not trained for this: near vectors mean similar wording more than similar
        meaning. Raises UserError for a text beyond the context, or without tokens.
        """
        if not ids:
            raise UserError("a text without tokens has no embedding")
        tokens = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
        with runtime.evaluating(self.model):
            return torch.nn.functional.normalize(self.model.hidden(tokens)[0].float().mean(0), dim=-1).cpu()

    @property
    def text_end_ids(self) -> frozenset[int]:
        """The same for a text to continue, which needs no template whose end is known."""
        try:
            return self.end_ids
        except UserError:
            return self.tokenizer.end_ids

    def _request(
        self, ids: Sequence[int], ends: frozenset[int], options: dict[str, Any], *, continues: bool = False
    ) -> Request:
        sampling = sampling_from({**self.own_sampling, **options})
        return Request(prompt=tuple(ids), sampling=sampling, end_ids=ends, continues=continues)

    def prompt_request(self, prompt: str, **options: Any) -> Request:
        """The engine's request to continue a text, which begins as the model's texts do."""
        ids = self.prompt_ids(prompt)
        return self._request(ids, self.text_end_ids, options, continues=bool(prompt))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a text to continue (`Tokenizer.encode_text`). Where nothing stands in front of a text, the
        empty one is the end-of-text token: a text begins where another ended."""
        return self.tokenizer.encode_text(prompt) or [self.tokenizer.end_of_text_id]

    def complete(self, prompt: str, **options: Any) -> Completion:
        """Continue a text; returns the continuation with ids, log-probabilities and the reason of its end."""
        return self.engine.generate([self.prompt_request(prompt, **options)])[0]

    def generate(self, prompt: str, **options: Any) -> str:
        """Continue a text: `generate("Once", max_new_tokens=20, temperature=0.0)`."""
        return self.complete(prompt, **options).text

    def stream(self, prompt: str, **options: Any) -> Iterator[Piece]:
        """`generate`, piece by piece."""
        return self.engine.stream(self.prompt_request(prompt, **options))

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises UserError for a base model, which has none."""
        if self.template is None:
            raise UserError(
                f"{self.name} has no chat template: it is a base model; use `chatwright generate`, or sft it"
            )
        return self.template

    def encode_chat(
        self, messages: Sequence[Message], *, max_new_tokens: int = 128, **beside: Unpack[Beside]
    ) -> FittedChat:
        """Encode a conversation, cut to the context less `max_new_tokens` (at least half of it). `beside` is
        what the template is given with it: tools, documents, variables, continue_final_message."""
        context = self.model.config.context
        room = max(context - max_new_tokens, context // 2)
        return fit_context(messages, self.require_template(), self.tokenizer, room, **beside)

    def chat_request(self, messages: Sequence[Message], **options: Any) -> tuple[Request, FittedChat]:
        """The engine's request for an answer, and what was left of the conversation. `options` are those of
        sampling, and what `encode_chat` gives the template."""
        beside, options = beside_of(options)
        template, longest = self.require_template(), sampling_from(options).max_new_tokens
        fitted = self.encode_chat(messages, max_new_tokens=longest, **beside)
        request = self._request(fitted.ids, self.end_ids, options)
        return request.stopping(template.stop_texts(self.tokenizer)), fitted

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The assistant's answer to a conversation."""
        return self.engine.generate([self.chat_request(messages, **options)[0]])[0].text

    def stream_chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Piece]:
        """`chat`, piece by piece."""
        return self.engine.stream(self.chat_request(messages, **options)[0])


def find_checkpoint(path: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint of a run, stage or checkpoint directory; None when `path` is none of these.

    A finished stage names its model in result.json. An unfinished stage means its newest valid checkpoint, a
    run its last finished stage that made a language model. The file checkpoints/best means the checkpoint
    that it names.
    """
    if path.name == checkpoint.BEST and path.is_file():
        return checkpoint.best(path.parent)
    if (path / "state.json").is_file():
        return checkpoint.Checkpoint(path)
    if (path / "result.json").is_file():
        chosen = _result(path / "result.json").get("model")
        if chosen:
            place = path / str(chosen)
            try:
                inside = place.resolve().is_relative_to(path.resolve())
            except (ValueError, OSError, RuntimeError):  # no name that a file can have
                inside = False
            if not inside:  # a directory from elsewhere must not name files outside of it
                raise UserError(
                    f"{path / 'result.json'} names a model outside of its directory: {chosen!r:.200}"
                )
            return checkpoint.Checkpoint(place)
    newest, _ = checkpoint.newest_valid(path / "checkpoints")
    if newest is not None:
        return newest
    results = sorted(path.glob("*/result.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for result in results:
        if ".old-" in result.parent.name:  # moved aside when its settings changed
            continue
        found = find_checkpoint(result.parent) if _result(result).get("model") else None
        if found is not None and found.state().get("kind") == "language":
            return found
    return None


def _result(file: Path) -> dict[str, Any]:
    """The result.json of a stage."""
    found = files.read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object")
    return found


def load_checkpoint(found: checkpoint.Checkpoint, *, verify: bool = True) -> Loaded:
    """The language model in one of our checkpoints. Raises UserError when it is damaged, or another kind of
    model."""
    state = found.state()
    if state.get("kind") != "language":
        kind = state.get("kind", "unknown")
        raise UserError(f"{found.path} holds a model of kind {kind!r}, not a language model")
    if verify:
        found.verify()
    if not isinstance(state.get("model"), dict):
        raise UserError(f"{found.path / 'state.json'} does not describe a model")
    where = str(found.path / "state.json")
    end_of_turn, end_of_text = (state.get(name) for name in ("end_of_turn", "end_of_text"))
    if not all(token is None or isinstance(token, str) for token in (end_of_turn, end_of_text)):
        raise UserError(f"{found.path / 'state.json'}: end_of_turn and end_of_text must be names of tokens")
    try:
        shape = GPTConfig.from_dict(state["model"])
    except UserError as error:
        raise UserError(f"{found.path / 'state.json'}: {error}") from None
    tensors = found.tensors("model")
    if shape.layers > len(tensors):  # check before building so many layers
        raise UserError(f"{found.path}: {shape.layers} blocks in state.json, {len(tensors)} tensors in all")
    with torch.device("meta"):
        model = GPT(shape)
    checkpoint.check_fit(model, tensors, where=str(found.path))  # before allocating memory
    model = model.to_empty(device="cpu")
    if model.config.tied:  # `to_empty` gives each use of a shared parameter its own memory
        model.head.weight = model.embed.weight
    checkpoint.load_model_tensors(model, tensors, where=str(found.path))
    has_template = (found.path / "chat_template.jinja").is_file()
    template = ChatTemplate.load(found.path, end=end_of_turn) if has_template else None
    tokenizer = _tokenizer_of(found.path, end_of_text, TextFrame.of_state(state.get("texts"), where))
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{found.path}: {tokenizer.vocab_size} tokens in tokenizer.json, {shape.vocab_size} in the model"
        )
    return Loaded(model, tokenizer, template, str(found.path), GenerationConfig.load(found.path))


def _tokenizer_of(directory: Path, end_of_text: str | None, frame: TextFrame | None) -> Tokenizer:
    """The tokenizer of a checkpoint. Where its state.json does not say what stands around a text, as before
    version 1.4, tokenizer.json does."""
    with located(str(directory / "tokenizer.json")):
        return Tokenizer.load(directory, end_of_text=end_of_text, frame=frame)


def load_parts(name: str | Path) -> Loaded:
    """Model, tokenizer and template by name. Raises UserError for an unknown name, with the possible ones.

    Names: a run, stage or checkpoint directory of ours; a Hugging Face directory; `smollm2`; `hf:owner/name`;
    a .gguf file; `BASE+ADAPTER`, any of these and the directory of a LoRA adapter in PEFT's format, which is
    merged into it.
    """
    text = str(name)
    if is_pair(text):
        return _load_adapted(text)
    if text == "smollm2":
        from chatwright.data.archives import smollm2_gguf
        from chatwright.interop.gguf import load_gguf

        return replace(load_gguf(smollm2_gguf()), generation=SMOLLM2_SAMPLING)
    if text.startswith("hf:"):
        from chatwright.interop.hf import load_hub

        return load_hub(text.removeprefix("hf:"))
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        from chatwright.interop.gguf import load_gguf

        return load_gguf(path)
    if path.is_dir() or (path.name == checkpoint.BEST and path.is_file()):
        found = find_checkpoint(path)
        if found is not None:
            return load_checkpoint(found)
        if (path / "config.json").is_file():
            from chatwright.interop.hf import load_hf

            return load_hf(path)
        begun = [one for one in unfinished_stages(path) if any((path / one / "checkpoints").glob("step-*"))]
        if begun:
            raise UserError(
                f"{path} has no finished model yet; the stage {begun[-1]} is under way: the command that "
                f"began it goes on, and {path / begun[-1]} means its newest checkpoint"
            )
        raise UserError(
            f"{path} holds no model: neither state.json, checkpoints/, a finished stage nor config.json"
        )
    hint = near_hub(text)
    raise UserError(
        f"no model {text!r}: there is no such directory or file{hint}"
        if hint
        else f"no model {text!r}: it is no directory, and no .gguf file; also known: smollm2, hf:owner/name "
        "(runs/tiny appears after `chatwright run tiny`)"
    )


def shape_of(name: str | Path) -> GPTConfig:
    """The shape of a model by name (as for `load_parts`), without its weights. Raises UserError."""
    text, path = str(name), Path(name)
    if is_pair(text):
        return shape_of(split_pair(text)[0])
    if text == "smollm2":  # known without fetching its file
        return GPTConfig.preset("smollm2-135m")
    if path.is_file() and path.suffix == ".gguf":
        from chatwright.interop.gguf import gguf_shape

        return gguf_shape(path)
    if text.startswith("hf:"):
        from chatwright.interop.hf import hub_shape

        return hub_shape(text.removeprefix("hf:"))
    found = find_checkpoint(path) if path.exists() else None
    if found is not None:
        with located(str(found.path / "state.json")):
            return GPTConfig.from_dict(found.state().get("model") or {})
    if (path / "config.json").is_file():
        from chatwright.interop.hf import hf_shape

        return hf_shape(path)
    raise UserError(f"{text!r} is no model whose shape could be read{near_hub(text)}")


def _load_adapted(name: str) -> Loaded:
    """BASE+ADAPTER."""
    base, adapter = split_pair(name)
    parts = load_parts(base)
    load_peft(adapter_directory(Path(adapter)), parts.model)
    merge(parts.model)
    return replace(parts, source=name)


def adapter_directory(path: Path) -> Path:
    """The adapter's directory: `path` itself, or the folder `adapter` in a finished stage's directory."""
    return path / FOLDER if is_adapter(path / FOLDER) else path


def load(name: str | Path, *, adapter: str | Path | None = None, dtype: str = "auto") -> LanguageModel:
    """A ready language model by name; see `load_parts`, and for `dtype` `make_runner`. Raises UserError.

    `adapter` is the directory of a LoRA adapter: `load("BASE", adapter="DIR")` is `load("BASE+DIR")`.
    """
    name = f"{name}+{adapter}" if adapter is not None else name
    parts = load_parts(name)
    if parts.tokenizer is None:
        raise UserError(f"{name} has no tokenizer.json beside its weights")
    runtime.set_threads()
    return LanguageModel(
        parts.model.to(runtime.device()),
        parts.tokenizer,
        parts.template,
        str(name),
        dtype=dtype,
        generation=parts.generation,
        source=parts.source,
    )
