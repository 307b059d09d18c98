"""Reward model: which of K answers would people prefer?  Ouyang et al. 2022, section 3.5.

Departures from the paper: by default the comparisons are made from texts that people rated one by one (a prompt with
K rated texts as its answers, ranked by their mean ratings), because that is the human preference data that installs as
a package; pairs closer than `margin` count as ties and are left out. The score is shifted and scaled after training so
that held-in answers have mean 0 and standard deviation 1 (the paper: demonstrations score 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatwright import runtime
from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.examples import Comparison, Dialogue, LabelledText
from chatwright.data.loader import WIDTH_STEP, SampleOrder, pad
from chatwright.language_model import load_parts
from chatwright.metrics import say
from chatwright.model.attention import plain_attention
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig
from chatwright.objectives.preference import bradley_terry_loss, pair_accuracy, preferred_pairs
from chatwright.optim import OptimConfig
from chatwright.tokenizer import Tokenizer
from chatwright.train import adapters, plan
from chatwright.train.health import diagnose_reward
from chatwright.train.loop import Fit, FitConfig
from chatwright.train.parallel import ALONE
from chatwright.train.sft import read_records
from chatwright.train.tokenizer import records_of
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Curve, Measure, Report, Unhealthy, Workspace


@dataclass(frozen=True)
class Config:
    """Settings of the reward model."""

    base: str = field(default="sft", metadata={"input": True})
    """The model whose body to start from; its template frames prompt and answer."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with ratings-*.jsonl (and dialogues-*.jsonl, whose first turns are the prompts)."""
    labels: int = 0
    """Rated texts to learn from, drawn by the seed; 0 takes all. Few make a judge that can be exploited (recipes/hacking.yaml)."""
    comparisons: str = ""
    """Your own comparisons instead: a directory with comparisons-train.jsonl and comparisons-validation.jsonl."""
    k: int = 16
    """Answers per prompt when comparisons are made from ratings (the paper: 4 to 9; here they cost no labeller's time)."""
    margin: float = 0.5
    """Ratings (or scores) closer than this are ties."""
    lead: float = 0.0
    """By how much a score is to exceed another's per unit by which the rating does: Llama 2's margin; 0 for none."""
    max_tokens: int = 80
    """Longer prompts lose their beginning, longer answers their end."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter and the scalar head instead of all weights: `lora.rank` above 0."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(seconds=90.0, batch_size=2, micro_batch=1, compile=False))
    """Length and portions of training; a sample is a prompt with its K answers."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            name="adamw", learning_rate=1e-3, schedule="trapezoid", decay=0.7, weight_decay=0.01
        )
    )
    """Optimiser and schedule."""


@dataclass(frozen=True)
class RankedBatch:
    """N prompts with K answers each, one row per answer, padded on the right."""

    ids: Int[Tensor, "rows time"]
    mask: Bool[Tensor, "rows time"]
    labels: Float[Tensor, "prompts k"]
    margin: float
    lead: float = 0.0

    @property
    def weight(self) -> float:
        """Number of prompts with at least one pair that is no tie."""
        return float(preferred_pairs(self.labels, self.margin).flatten(1).any(1).sum())


def encode_answer(
    prompt: Sequence[Message], answer: str, template: ChatTemplate, tokenizer: Tokenizer, max_tokens: int
) -> list[int]:
    """Prompt, answer and end token as at most `max_tokens` ids: the scored row always ends with the end token."""
    before = template.encode(list(prompt), tokenizer, add_generation_prompt=True).ids
    content = tokenizer.encode(answer)[: max_tokens - 2]
    room = max_tokens - 1 - len(content)
    return [*before[len(before) - min(room, len(before)) :], *content, tokenizer.control_ids[template.end]]


def first_prompts(records: Sequence[Dialogue], most: int) -> list[tuple[Message, ...]]:
    """The first user turn of up to `most` conversations: the short ones (under 24 characters) where there are any, for
    a prompt costs time in every row; else all."""
    first = [dialogue.messages[:1] for dialogue in islice(records, most) if dialogue.messages[0]["role"] == "user"]
    return [turn for turn in first if len(turn[0]["content"]) < 24] or first


def from_ratings(
    texts: Sequence[LabelledText], prompts: Sequence[tuple[Message, ...]], k: int, seed: int, passes: int = 1
) -> list[Comparison]:
    """Each text once per pass, K at a time, as the answers to a prompt drawn at random; ratings are the scores.

    Prompt and text have nothing to do with each other: the model is to judge the text whatever came before. The K texts
    of a comparison are of about the same length (within the jitter of 20 % that makes each pass different): length
    cannot decide a comparison, and little is wasted on padding.
    """
    if not prompts:
        raise UserError("there are no conversations to take prompts from; set `dialogues` in the data stage")
    result = []
    lengths = torch.tensor([float(len(text.text)) for text in texts])
    for turn in range(passes):
        draw = runtime.generator("ratings", seed, turn)
        order = (lengths * (1 + 0.2 * torch.rand(len(texts), generator=draw))).argsort().tolist()
        for start in range(0, len(order) - k + 1, k):
            group = [texts[n] for n in order[start : start + k]]
            prompt = prompts[int(torch.randint(len(prompts), (1,), generator=draw))]
            result.append(Comparison.of(prompt, [text.text for text in group], [text.label for text in group]))
    if not result:
        raise UserError(f"{len(texts)} rated texts are too few for comparisons of {k}; lower k or add ratings")
    return result


@dataclass(frozen=True)
class Rankings:
    """Comparisons in an order that depends on the seed and the index alone."""

    comparisons: list[Comparison]
    template: ChatTemplate
    tokenizer: Tokenizer
    config: Config
    order: SampleOrder

    def take(self, start: int, count: int) -> RankedBatch:
        """Samples start ... start + count - 1."""
        return self.batch([self.comparisons[n] for n in self.order.take(start, count)])

    def batch(self, chosen: Sequence[Comparison], k: int = 0) -> RankedBatch:
        """These comparisons as tensors; prompts with fewer answers than others (or than `k`) are filled with unrated
        empty ones."""
        k = max(k, *(len(one.responses) for one in chosen))
        rows, labels = [], []
        for one in chosen:
            for n in range(k):
                answer = one.responses[n] if n < len(one.responses) else ""
                rows.append(encode_answer(one.prompt, answer, self.template, self.tokenizer, self.config.max_tokens))
                labels.append(one.scores[n] if n < len(one.scores) else float("nan"))
        ids = pad(rows, self.tokenizer.end_of_text_id, multiple=WIDTH_STEP)
        mask = pad([[1] * len(row) for row in rows], 0, multiple=WIDTH_STEP).bool()
        return RankedBatch(ids, mask, torch.tensor(labels).view(-1, k), self.config.margin, self.config.lead)


def step(model: ScalarModel, batch: RankedBatch) -> Step:
    """Bradley-Terry loss over all pairs of each prompt, every answer forwarded once; accuracy beside it."""
    scores = model.score(batch.ids, batch.mask).view(batch.labels.shape)
    right, pairs = pair_accuracy(scores.detach(), batch.labels, batch.margin)
    accuracy = torch.tensor(batch.weight * right / max(pairs, 1))
    lead = batch.lead * (batch.labels[:, :, None] - batch.labels[:, None, :]) if batch.lead else None
    return Step(bradley_terry_loss(scores, batch.labels, batch.margin, lead=lead), {"accuracy": accuracy})


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def judge(model: ScalarModel, rankings: Rankings, chosen: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """Scores and labels (N, K) of comparisons of up to K answers; labels are NaN where there is none."""
    scores, labels = [], []
    k = max(len(one.responses) for one in chosen)
    for start in range(0, len(chosen), 16):
        batch = runtime.on_device(rankings.batch(chosen[start : start + 16], k))
        scores.append(model.score(batch.ids, batch.mask).view(batch.labels.shape).float().cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(scores), torch.cat(labels)


def load_comparisons(config: Config, workspace: Workspace) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons: the user's own, or made from ratings."""
    if config.comparisons:
        directory = workspace.resolve(config.comparisons)
        both = [list(read_records(directory / f"comparisons-{side}.jsonl", Comparison)) for side in SIDES]
        return both[0], both[1]
    records = records_of(workspace.resolve(config.data))
    made = []
    for side, passes in zip(SIDES, (8, 1), strict=True):
        texts = list(read_records(records / f"ratings-{side}.jsonl", LabelledText))
        if side == "train":
            texts = drawn(texts, config.labels, workspace.seed)
        dialogues = read_records(records / f"dialogues-{side}.jsonl", Dialogue)
        made.append(from_ratings(texts, first_prompts(dialogues, 2_000), config.k, workspace.seed, passes))  # type: ignore[arg-type]
    return made[0], made[1]


def drawn(texts: list[LabelledText], labels: int, seed: int) -> list[LabelledText]:
    """As many of the texts, chosen by the seed, in their order; all of them for 0. Raises UserError when they are fewer."""
    if not labels:
        return texts
    if labels > len(texts):
        raise UserError(f"labels is {labels}, but there are {len(texts)} rated texts to learn from")
    return [texts[n] for n in sorted(SampleOrder(len(texts), runtime.seed_for(seed, "labels")).take(0, labels))]


SIDES = ("train", "validation")


def length_baseline(train: Sequence[Comparison], held_out: Sequence[Comparison], margin: float) -> float:
    """Accuracy of "the longer (or the shorter) answer wins", whichever is better on the training pairs."""

    def accuracy(comparisons: Sequence[Comparison]) -> float:
        right = pairs = 0.0
        for one in comparisons:
            lengths = torch.tensor([[float(len(answer)) for answer in one.responses]])
            won, count = pair_accuracy(lengths, torch.tensor([one.scores]), margin)
            right, pairs = right + won, pairs + count
        return right / max(pairs, 1.0)

    longer = accuracy(held_out)
    return longer if accuracy(train) >= 0.5 else 1 - longer


def run(config: Config, workspace: Workspace) -> Report:
    """Train the reward model and measure its accuracy on held-out comparisons before and after."""
    base = load_parts(workspace.resolve(config.base) if config.base in workspace.inputs else config.base)
    if base.tokenizer is None or base.template is None:
        raise UserError(f"{config.base} has no chat template; the reward model needs a model after sft")
    train, held_out = load_comparisons(config, workspace)
    config = plan.ahead("reward", config, base.model.config, ALONE)
    torch.manual_seed(runtime.seed_for(workspace.seed, "reward"))
    model = ScalarModel(base.model.config)
    model.start_from(base.model)
    adapters.adapt(model, config.lora, "reward model")
    model.to(runtime.device())
    if runtime.device().type == "cpu":
        model.body.use_attention(plain_attention)
    runtime.tune_allocator()
    dtype = runtime.compute_dtype(config.fit.precision)
    order = SampleOrder(len(train), workspace.seed)
    rankings = Rankings(train, base.template, base.tokenizer, config, order)
    trainer = Trainer(
        {"model": model},
        config.optim,
        workspace,
        card={"kind": "reward", "model": model.config.to_dict(), "tokenizer": base.tokenizer.fingerprint,
              "template": base.template.fingerprint, **adapters.card(config.lora, base=base.model)},
        texts={"tokenizer.json": base.tokenizer.to_json(), "chat_template.jinja": base.template.source},
        keep=config.fit.keep,
    )  # fmt: skip
    say(f"  {len(train):,} comparisons of {len(train[0].responses)} answers, {len(held_out):,} held out")

    def train_step(batch: RankedBatch) -> Step:
        with runtime.autocast(dtype):
            return step(model, batch)

    def evaluate() -> dict[str, float]:
        with runtime.autocast(dtype):
            scores, labels = judge(model, rankings, held_out)
        right, pairs = pair_accuracy(scores, labels, config.margin)
        known = ~labels.isnan()
        return {
            "held_out_accuracy": right / max(pairs, 1),
            "held_out_correlation": correlation(scores[known], labels[known]),
        }

    fitted = Fit(
        trainer, config.fit, rankings, train_step, evaluate,
        title="reward", throughput=("answers", float(config.k)), best=("held_out_accuracy", "higher"),
    ).run()  # fmt: skip
    saved = normalise(trainer, model, rankings, train[:64], dtype)
    before, after = fitted.before, fitted.after
    report = Report(
        measures=[
            Measure("accuracy on held-out pairs", before["held_out_accuracy"], after["held_out_accuracy"], "higher"),
            Measure("accuracy of length alone", None, length_baseline(train, held_out, config.margin), "context"),
            Measure("correlation with held-out ratings", before["held_out_correlation"],
                    after["held_out_correlation"], "higher"),
        ],
        curves=[Curve("Reward model loss", ["loss"], "nats per prompt"), Curve("Accuracy", ["accuracy"])],
        model=saved,
        facts={"comparisons": len(train), "steps": fitted.progress.step,
               "held_out_correlation": after["held_out_correlation"],
               "held_out_accuracy": after["held_out_accuracy"],
               "sample": example_scores(model, rankings), **fitted.facts},
        notes=fitted.notes,
    )  # fmt: skip
    with runtime.evaluating(model), runtime.autocast(dtype):
        right, pairs = pair_accuracy(*judge(model, rankings, train[:64]), config.margin)
    refuse_if_learnt_by_heart(report, right / max(pairs, 1), held_out, config.margin)
    return report


def refuse_if_learnt_by_heart(report: Report, accuracy: float, held_out: Sequence[Comparison], margin: float) -> None:
    """Raise Unhealthy with the report when the model is good on training pairs and guesses on held-out ones."""
    pairs = sum(int(preferred_pairs(torch.tensor([one.scores]), margin).sum()) for one in held_out)
    diagnosis = diagnose_reward(
        train=accuracy, held_out=report.facts["held_out_accuracy"], length=report.measures[1].after or 0.5, pairs=pairs
    )
    if diagnosis is not None:
        report.model = None  # no other stage is to use it
        report.notes.insert(0, diagnosis.text)
        raise Unhealthy(f"reward: {diagnosis.text}", report)


def example_scores(model: ScalarModel, rankings: Rankings) -> str:
    """What the model thinks of two answers, in a sentence for the report."""
    answers = ("That sounds great, I love it!", "That sounds awful, I hate it.")
    prompt = (Message(role="user", content="I will go hiking on Saturday."),)
    batch = runtime.on_device(rankings.batch([Comparison.of(prompt, answers, (0.0, 0.0))]))
    with runtime.evaluating(model):
        scores = model.score(batch.ids, batch.mask).tolist()
    return ", ".join(f"scores {answer!r} {score:+.2f}" for answer, score in zip(answers, scores, strict=True))


def normalise(
    trainer: Trainer, model: ScalarModel, rankings: Rankings, chosen: Sequence[Comparison], dtype: torch.dtype
) -> str:
    """Give scores mean 0 and standard deviation 1 on training answers, save, and return the checkpoint's name.

    Done once: a stage that is run again after this keeps the constants it has.
    """
    with runtime.evaluating(model), runtime.autocast(dtype):
        scores, labels = judge(model, rankings, chosen)
    scores = scores[~labels.isnan()]
    with torch.no_grad():
        deviation = scores.std().clamp(min=1e-6)
        model.offset.add_(scores.mean() / model.scale)
        model.scale.div_(deviation)
    saved = trainer.save(final=True)
    return f"checkpoints/{saved.path.name}"
