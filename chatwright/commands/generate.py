"""Continue a text.

Only the continuation goes to standard output, while it is generated. On a terminal its control characters are
shown as pictures, as in `chat`; in a pipe or a file they stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatwright.commands.chat import stopping, tell_about
from chatwright.config import UsageError, UserError, harmless, parse
from chatwright.streams import meant

if TYPE_CHECKING:
    from chatwright.generate.sampling import Sampling
    from chatwright.language_model import LanguageModel


@dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and how tokens are chosen."""

    prompt: str | None = None
    """Text to continue; without it standard input is read. It may be empty: the model then begins a text."""
    prompt_file: str | None = None
    """UTF-8 file with the text to continue. One line end at its very end is left out, as with standard input.
    """
    max_new_tokens: int = 128
    """Most tokens to produce; fewer where the context ends earlier."""
    temperature: float | None = None
    """Logits are divided by it; 0 takes the likeliest token (greedy). This and the next four, when not given,
    are the model's own (generation_config.json); where it has none, temperature 0.7 and nothing left out."""
    top_k: int | None = None
    """Keep this many likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities sum to this; 1 keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest; 0 keeps all."""
    repetition_penalty: float | None = None
    """Makes tokens of the prompt and the answer less likely where above 1."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the continuation and are not part of it: --stop '["\\n\\n", "THE END"]'."""
    seed: int | None = None
    """Makes the result repeatable: sample k (from 0) uses seed + k."""
    count: int = 1
    """How many continuations; each has a heading when there are several."""
    dtype: str = "auto"
    """Weights while generating: fp32, bf16, int8 or int4 (compiled CPU kernels); auto takes bf16 for models
    above 20 M."""
    beams: int = 0
    """Above 0: the `count` best continuations found by beam search with so many beams, without chance."""
    length_penalty: float = 1.0
    """Of beam search; above 1 favours long continuations, below 1 short ones."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("give --prompt or --prompt_file, not both")
        if self.count < 1 or self.beams < 0:
            raise UsageError(f"--count is {self.count} and --beams {self.beams}; at least 1 and at least 0")
        if not self.beams and self.length_penalty != 1.0:
            raise UsageError("--length_penalty belongs to beam search: give --beams as well")
        if self.beams and self.count > self.beams:
            raise UsageError(
                f"--count {self.count}: {self.beams} beams give at most {self.beams} continuations"
            )
        if self.beams:
            for one in fields(self):
                if one.name in CHANCE and getattr(self, one.name) not in (one.default, []):
                    raise UsageError(f"--beams leaves nothing to chance: --{one.name} has no place beside it")


CHANCE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
"""Settings of sampling, which have no effect on beam search."""


def main(argv: Sequence[str]) -> int:
    """Print continuations; returns the exit code. Raises UserError if there is no such model, or the prompt
    is too long or not UTF-8."""
    config, positionals = parse(
        GenerateConfig,
        argv,
        prog="chatwright generate",
        description=(
            "Continue a text with MODEL, a base model or a chat model (whose chat template is not used here)."
        ),
        positionals={
            "model": "A run, a model directory, smollm2, hf:owner/name or a .gguf file.",
            "text?": "Text to continue: the same as --prompt.",
        },
    )
    if positionals["text"] is not None:
        if config.prompt is not None or config.prompt_file is not None:
            raise UsageError("the text to continue is given twice: leave out --prompt or --prompt_file")
        config = replace(config, prompt=str(positionals["text"]))
    prompt = read_prompt(config)
    sampling_of(config, {})  # refuses impossible values before the model is loaded
    from chatwright.language_model import load

    model = load(str(positionals["model"]), dtype=config.dtype)
    tell_about(model)
    show = harmless if sys.stdout.isatty() else str
    if config.beams:
        return _search(model, prompt, config, show)
    return _sample(model, prompt, sampling_of(config, model.own_sampling), config.count, show)


def sampling_of(config: GenerateConfig, own: Mapping[str, Any]) -> Sampling:
    """The engine's settings: those given, else the model's `own`. Raises UsageError for invalid values."""
    from chatwright.generate.sampling import Sampling

    names = {one.name for one in fields(Sampling)}
    values = {one.name: getattr(config, one.name) for one in fields(config) if one.name in names}
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return Sampling(**{**own, **given, "stop": tuple(map(meant, config.stop))})
    except UserError as error:
        raise UsageError(str(error)) from None


def read_prompt(config: GenerateConfig) -> str:
    """The text to continue: the option, the file or standard input. Raises UserError when it cannot be
    read."""
    if config.prompt is not None:
        return meant(config.prompt)
    if config.prompt_file is not None:
        where = config.prompt_file
        try:
            data = Path(where).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"--prompt_file {where}: {error.strerror}") from None
    elif sys.stdin.isatty():
        raise UsageError(
            "nothing to continue: give a text behind the model (or --prompt TEXT), --prompt_file FILE, or "
            "text on standard input"
        )
    else:
        where = "standard input"
        buffer = getattr(sys.stdin, "buffer", None)
        data = buffer.read() if buffer is not None else sys.stdin.read().encode()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte {data[error.start]:#04x} at {error.start})"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _heading(number: int, count: int, note: str) -> None:
    """Print the line above a continuation, if there are several."""
    if count > 1:
        print(f"{'' if number == 1 else chr(10)}=== {number} of {count}{note} ===", flush=True)


def _sample(
    model: LanguageModel, prompt: str, sampling: Sampling, count: int, show: Callable[[str], str]
) -> int:
    """Generate all continuations in one batch. The first is printed while it grows, the others after it."""
    from chatwright.generate.sampling import nth_seed

    requests = [model.prompt_request(prompt, **asdict(sampling))] * count
    if sampling.seed is not None:
        requests = [
            replace(one, sampling=replace(sampling, seed=nth_seed(sampling.seed, number)))
            for number, one in enumerate(requests)
        ]
    handles = [model.engine.submit(one) for one in requests]
    with stopping() as stopped:
        try:
            for number, handle in enumerate(handles, 1):
                seed = handle.request.sampling.seed
                _heading(number, count, "" if seed is None else f", seed {seed}")
                for piece in handle.pieces():
                    sys.stdout.write(show(piece.text))
                    sys.stdout.flush()
                    if stopped():
                        for other in handles:
                            other.cancel()
                print(flush=True)
                if stopped():
                    return 130
        finally:  # also when the pipe is closed, or a second Ctrl-C raises KeyboardInterrupt
            for handle in handles:
                handle.cancel()
    return 0


def _search(model: LanguageModel, prompt: str, config: GenerateConfig, show: Callable[[str], str]) -> int:
    """Print the best continuations of beam search, best first."""
    from chatwright.generate.beam import beam_search
    from chatwright.generate.sequence import tokens_with_text
    from chatwright.tokenizer import TextStream

    request = model.prompt_request(prompt)
    found = beam_search(
        model.model,
        request.prompt,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        end_ids=request.end_ids,
        length_penalty=config.length_penalty,
        known=tokens_with_text(model.tokenizer, model.model.config.vocab_size),
    )[: config.count]
    for number, (ids, score) in enumerate(found, 1):
        _heading(number, len(found), f", score {score:.3f}")
        stream = TextStream(model.tokenizer, continues=request.continues)
        text = [stream.push(one) for one in ids if one not in request.end_ids]
        print(show("".join([*text, stream.flush()])), flush=True)
    return 0
