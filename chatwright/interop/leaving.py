"""What every export needs: which format's family a shape is, its end tokens, and a template that speaks for
itself."""

from __future__ import annotations

from dataclasses import dataclass, fields

from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.interop.families import FAMILIES, config_from_hf
from chatwright.interop.loaded import Loaded, end_of_text
from chatwright.interop.templates import SPECIAL_TOKENS, with_tokens
from chatwright.model.config import GPTConfig
from chatwright.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ends:
    """The tokens that end something."""

    turn: str | None
    """Closes an assistant's turn; None for a base model."""
    text: str
    """Stands between documents."""
    others: tuple[str, ...] = ()
    """What else closes an assistant's turn."""

    @property
    def all(self) -> tuple[str, ...]:
        """Where generation stops."""
        return tuple(dict.fromkeys((self.sequence, *self.others, self.text)))

    @property
    def sequence(self) -> str:
        """What other programs call the end-of-sequence token: where generation stops."""
        return self.turn or self.text


def family_name(config: GPTConfig) -> str:
    """The nearest family of the formats, by transformers' names: that of the model, if it can say all of the
    shape, else the one that loses least. Whether it carries all of it is `check_shape`'s."""
    lost = {name: len(_lost(config, name)) for name, family in FAMILIES.items() if not family.written_as}
    return config.family if lost.get(config.family) == 0 else min(lost, key=lost.__getitem__)


def _lost(config: GPTConfig, name: str) -> list[str]:
    """The fields that a model would lose if it were written as this family; all if it could not be read."""
    try:
        read = config_from_hf({"model_type": name, **FAMILIES[name].settings(config)})
    except UserError:
        return [field.name for field in fields(GPTConfig)]
    return different(config, read)


def different(one: GPTConfig, other: GPTConfig) -> list[str]:
    """The fields in which two shapes compute different things."""
    return [
        field.name
        for field in fields(GPTConfig)
        if field.compare and getattr(one, field.name) != getattr(other, field.name)
    ]


def check_shape(config: GPTConfig, carried: GPTConfig, family: str) -> None:
    """Raise UserError unless the shape that the format would be read back as is the one that is to be
    written."""
    for name in different(config, carried):
        mine, theirs = getattr(config, name), getattr(carried, name)
        raise UserError(
            f"the model has {name} {mine!r}, and {family}, the nearest family, can only say {theirs!r}: it "
            "would compute something else there"
        )


def ends_of(parts: Loaded, tokenizer: Tokenizer) -> Ends:
    """The end tokens of a model. Raises UserError when readers would take another token for one of them."""
    size, rows = (
        1 + max(tokenizer.backend.get_vocab(with_added_tokens=True).values()),
        parts.model.config.vocab_size,
    )
    if size > rows:
        raise UserError(f"the tokenizer has {size} tokens and the model {rows}: they do not belong together")
    turns: list[str] = []
    if parts.template is not None:
        parts.template.end_ids(tokenizer)  # a given end that nobody knows is refused
        found = parts.template.ends(tokenizer)
        named = sorted(found.tokens, key=lambda token: token != found.last)  # the last one's first
        turns = [token for token in named if token in tokenizer.control_ids]
    ends = Ends(turns[0] if turns else None, tokenizer.end_of_text, tuple(turns[1:]))
    guessed = end_of_text(tokenizer.controls, ends.sequence, where=parts.source)
    if guessed != ends.text:
        raise UserError(f"its texts end with {ends.text}, which other programs would take to be {guessed}")
    return ends


def chats_begin_like_texts(parts: Loaded, tokenizer: Tokenizer) -> bool:
    """Whether a conversation begins with what stands in front of a text; True for a base model."""
    if parts.template is None:
        return True
    begin = list(tokenizer.frame.begin)
    for role in ("user", "system"):  # a template may want either first
        try:
            message = Message(role=role, content="x")
            ids = parts.template.encode([message], tokenizer, add_generation_prompt=True).ids
        except UserError:
            continue
        return ids[: len(begin)] == begin
    return False


def exported(template: ChatTemplate) -> ChatTemplate:
    """The template, and its other templates, such that they mean the same to programs that hand them their
    own special tokens."""
    others = {name: _portable(text) for name, text in template.named.items()}
    return ChatTemplate(portable(template), template.end or None, named=others)


def portable(template: ChatTemplate) -> str:
    """The text of `exported`. Here special tokens are undefined: where the text uses one that it does not set
    itself, it is set to be empty."""
    return _portable(template.source)


def _portable(source: str) -> str:
    import jinja2
    from jinja2 import meta

    from chatwright.sandbox import Sandbox

    try:
        free = meta.find_undeclared_variables(Sandbox().parse(source)) & set(SPECIAL_TOKENS)
    except (jinja2.TemplateError, RecursionError):  # nothing is known about the text
        free = {"bos_token", "eos_token"}
    return with_tokens(source, dict.fromkeys(sorted(free), ""))
