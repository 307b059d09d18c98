"""A tokenizer as transformers reads it: what stands around a text, and what ends an answer, for every version
of it and for vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from chatwright.interop.leaving import Ends
from chatwright.text_frame import of_post_processor, template_processing
from chatwright.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerFiles:
    """What is written of a tokenizer."""

    content: str
    """tokenizer.json."""
    settings: dict[str, Any]
    """tokenizer_config.json, but for the context."""
    ids: dict[str, int]
    """bos_token_id and eos_token_id of config.json."""
    stops: list[int]
    """All ends of an answer, that of the sequence first: eos_token_id of generation_config.json."""


def tokenizer_files(tokenizer: Tokenizer, ends: Ends) -> TokenizerFiles:
    """What is to be written of a tokenizer."""
    frame = tokenizer.frame
    begin = frame.begin[0] if frame.begin else tokenizer.end_of_text_id
    end = tokenizer.control_ids.get(ends.sequence, tokenizer.end_of_text_id)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, in every version
        "bos_token": tokenizer.name(begin),
        "eos_token": tokenizer.name(end),
        "pad_token": ends.text,
        "clean_up_tokenization_spaces": False,
    }
    if len(frame.begin) < 2 and frame.close in ((), (end,)):
        # Else they would contradict the post-processor, which says more, where these two are obeyed.
        settings |= {"add_bos_token": bool(frame.begin), "add_eos_token": bool(frame.close)}
    others = sorted(tokenizer.end_ids - {end, tokenizer.end_of_text_id})
    turns = [tokenizer.control_ids[one] for one in ends.all if one in tokenizer.control_ids]
    stops = list(dict.fromkeys((end, *turns, tokenizer.end_of_text_id, *others)))
    ids = {"bos_token_id": begin, "eos_token_id": end}
    return TokenizerFiles(_content(tokenizer), settings, ids, stops)


def _content(tokenizer: Tokenizer) -> str:
    """tokenizer.json, whose post-processor puts around a text what stands there; as it is where it does."""
    text, frame = tokenizer.to_json(), tokenizer.frame
    content = json.loads(text)
    own = of_post_processor(content, "the tokenizer")
    if (own.begin, own.close) == (frame.begin, frame.close) if own else not (frame.begin or frame.close):
        return text
    names = {number: tokenizer.name(number) for number in (*frame.begin, *frame.close)}
    content["post_processor"] = template_processing(frame, names)
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
