"""Several chat models on the same prompts, as a person would chat with them: answers and their measures.

Each model answers with its own chat settings (`chatwright/generation_config.py::chat_options`), unless some
are given. The models may be of different families, with tokenizers of their own; so lengths are in words, and
a reward model reads the answers as text, in its own template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from chatwright import runtime
from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.data import sources
from chatwright.data.files import RECORD_SUFFIXES
from chatwright.data.reading import decode, open_bytes, suffix_of
from chatwright.generation_config import chat_options, told
from chatwright.language_model import find_checkpoint, load
from chatwright.messages import Message, described
from chatwright.metrics import say
from chatwright.model.attention import plain_attention
from chatwright.model.heads import ScalarModel
from chatwright.model_names import weights_note
from chatwright.tokenizer import Tokenizer
from chatwright.train.preference.rankings import encode_answer, padded
from chatwright.train.rl.models import read_reward
from chatwright.train.rl.rollout import distinct
from chatwright.train.statistics import bootstrap_interval, paired_difference

PROMPTS = (
    "Hi! How are you today?",
    "What can you help me with?",
    "Can you recommend a book for a long train ride?",
    "Explain in two sentences why the sky is blue.",
    "I had a bad day at work.",
    "What is the capital of France, and what is it known for?",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "How do I boil an egg?",
    "Give me three ideas for a rainy Sunday.",
    "What is the difference between a simile and a metaphor?",
    "My friend is moving away. What should I say to her?",
    "How many days are there in a leap year?",
    "Tell me a short story about a lost key.",
    "Is it better to learn the piano or the guitar first?",
    "Summarise in one sentence: The meeting was moved from Monday to Wednesday because two people were ill.",
    "What should I check before I buy a used bicycle?",
)
"""Prompts for models of any kind, where the user names none."""

WORDS, ENDED, DISTINCT, REWARD, WINS = (
    "words per answer",
    "share that ends",
    "distinct-2",
    "reward model's score",
    "win rate by the reward model",
)

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class ModelAnswers:
    """One model's answers."""

    name: str
    sampling: str
    """Its chat settings, for people."""
    texts: Sequence[str]
    ended: Sequence[bool]
    """Whether an answer came to its end before the limit."""
    scores: Sequence[float] = ()
    """The reward model's; empty without one."""


@dataclass(frozen=True)
class TextReward:
    """A reward model that reads texts."""

    model: ScalarModel
    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def load(cls, directory: Path) -> TextReward:
        """The reward model of a stage. Raises UserError when there is none."""
        found = find_checkpoint(directory) if directory.is_dir() else None
        if found is None or found.state().get("kind") != "reward":
            raise UserError(
                f"--reward {directory} holds no reward model; name a stage such as runs/my/reward"
            )
        model = read_reward(found).to(runtime.device()).eval()
        if runtime.device().type == "cpu":
            model.body.use_attention(plain_attention)
        return cls(model, Tokenizer.load(found.path), ChatTemplate.load(found.path))

    @torch.no_grad()
    def scores(self, prompts: Sequence[Conversation], texts: Sequence[str]) -> list[float]:
        """The score of each answer."""
        found: list[float] = []
        context = self.model.config.context
        for prompt, text in zip(prompts, texts, strict=True):
            row = encode_answer(prompt, text, self.template, self.tokenizer, context)
            ids, mask = padded([row], self.tokenizer)
            found.append(float(self.model.score(runtime.on_device(ids), runtime.on_device(mask))))
        return found


def read_prompts(file: str, most: int) -> list[Conversation]:
    """The first `most` prompts: of a text file, one a line; of a file of conversations, each up to its last
    user turn; without a file, those of this module. Raises UserError."""
    if not file:
        return [_question(text) for text in PROMPTS[:most]]
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--prompts {file}: there is no such file")
    if suffix_of(path) in RECORD_SUFFIXES:
        found: list[Conversation] = list(
            islice(_last_questions(dialogue.messages for dialogue in sources.dialogues(file)), most)
        )
    else:
        try:
            with open_bytes(path) as opened:
                lines = decode(opened.read(), path, 0).splitlines()
        except UserError as error:
            raise UserError(f"--prompts: {error}; give one prompt a line") from None
        found = [_question(line.strip()) for line in lines if line.strip()][:most]
    if not found:
        raise UserError(f"--prompts {file}: there is no prompt in it; give one a line, or conversations")
    return found


def _question(text: str) -> Conversation:
    return (Message(role="user", content=text),)


def _last_questions(conversations: Iterable[Sequence[Message]]) -> Iterable[Conversation]:
    for messages in conversations:
        turns = [n for n, message in enumerate(messages) if message["role"] == "user"]
        if turns:
            yield tuple(messages[: turns[-1] + 1])


def ask(
    name: str, prompts: Sequence[Conversation], given: dict[str, Any], *, most: int, seed: int
) -> ModelAnswers:
    """A model's answers of at most `most` tokens, prompt n with the seed `seed` + n. `given` are sampling
    settings that stand above its own. Raises UserError for a name that is no chat model."""
    model = load(name)
    model.require_template()
    options, context = chat_options(model.generation, given), model.model.config.context
    reserve = max(1, min(most, context // 4))  # as a chat does: a prompt may take the rest of the context
    requests = []
    for n, prompt in enumerate(prompts):
        try:
            request, _ = model.chat_request(list(prompt), max_new_tokens=reserve, seed=seed + n, **options)
        except UserError as error:
            raise UserError(f"{name}, prompt {n + 1} ({shown(prompt):.40}): {error}") from None
        longest = min(most, context - len(request.prompt))
        requests.append(replace(request, sampling=replace(request.sampling, max_new_tokens=longest)))
    done = model.engine.generate(requests)
    return ModelAnswers(
        name,
        told(model.generation, given),
        [one.text for one in done],
        [one.finish_reason == "stop" for one in done],
    )


@dataclass(frozen=True)
class ModelComparison:
    """Models side by side."""

    prompts: Sequence[Conversation]
    models: Sequence[ModelAnswers]
    most: int
    """Longest answer, tokens."""
    seed: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """{measure, values, differences}: the values of all models, and for the second and later ones the
    difference from the first, in words, where it can be tested."""

    def measure(self) -> None:
        """Fill `rows`."""
        words = [[float(len(text.split())) for text in one.texts] for one in self.models]
        self._paired(WORDS, words)
        self._paired(ENDED, [list(map(float, one.ended)) for one in self.models])
        self._row(DISTINCT, [distinct(one.texts) for one in self.models])
        if self.models[0].scores:
            scores = [list(one.scores) for one in self.models]
            self._paired(REWARD, scores)
            wins = [
                [1.0 if b > a else 0.5 if b == a else 0.0 for a, b in zip(scores[0], other, strict=True)]
                for other in scores[1:]
            ]
            intervals = [bootstrap_interval(torch.tensor(one), seed=self.seed) for one in wins]
            said = ["shown" if low > 0.5 or high < 0.5 else "nothing was shown" for low, high in intervals]
            notes = [
                f"{text}: 95 % interval {low:.2f} to {high:.2f} against 0.5"
                for text, (low, high) in zip(said, intervals, strict=True)
            ]
            self._row(WINS, [None, *(sum(one) / len(one) for one in wins)], notes)

    def _paired(self, name: str, values: Sequence[Sequence[float]]) -> None:
        means = [sum(one) / len(one) for one in values]
        notes = [paired_difference(values[0], other, seed=self.seed).told() for other in values[1:]]
        self._row(name, means, notes)

    def _row(self, name: str, values: Sequence[float | None], notes: Sequence[str] = ()) -> None:
        self.rows.append({"measure": name, "values": list(values), "differences": list(notes)})

    def plain(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {
            "models": [{"name": one.name, "sampling": one.sampling} for one in self.models],
            "max_new_tokens": self.most,
            "seed": self.seed,
            "measures": self.rows,
            "answers": [
                {
                    "prompt": shown(prompt),
                    "answers": [one.texts[n] for one in self.models],
                    "scores": [one.scores[n] for one in self.models] if self.models[0].scores else [],
                }
                for n, prompt in enumerate(self.prompts)
            ],
        }


def shown(prompt: Conversation) -> str:
    """A prompt for people: its turns, separated by ` / `."""
    return " / ".join(described(message["content"]) for message in prompt)


def compare_models(
    names: Sequence[str],
    prompts: Sequence[Conversation],
    given: dict[str, Any],
    *,
    reward: str = "",
    most: int,
    seed: int,
    tell: Callable[[str], None] = say,
) -> ModelComparison:
    """Ask all models, one after the other, and measure. `tell` gets a line for each. Raises UserError."""
    for note in dict.fromkeys(filter(None, map(weights_note, names))):
        tell(f"  {note}")
    for name in names:  # before any of them answers: that takes a while
        if not (Path(name).exists() or name == "smollm2" or name.startswith("hf:") or "+" in name):
            load(name)  # raises UserError with the names that there are
    scorer = TextReward.load(Path(reward)) if reward else None
    answered = []
    for name in names:
        tell(f"  asking {name} {len(prompts)} prompts")
        one = ask(name, prompts, given, most=most, seed=seed)
        if scorer is not None:
            one = replace(one, scores=scorer.scores(prompts, one.texts))
        answered.append(one)
    found = ModelComparison(prompts, answered, most, seed)
    found.measure()
    return found
