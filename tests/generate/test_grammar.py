"""Completions that keep to a grammar, whatever the model would like to say."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import tokenizers
import torch

from chatwright.config import UserError
from chatwright.generate import grammar as grammar_module
from chatwright.generate.engine import Completion, Engine, Request
from chatwright.generate.grammar import Grammar, json_object, json_schema, lark, regex
from chatwright.generate.sampling import BatchSampler, Sampling
from chatwright.generate.schemas import JOINED_PATTERNS, LARGEST_SCHEMA, LONGEST_PATTERN
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

MakeModel = Callable[..., GPT]
BOUND = 1e-4
"""As in test_engine.py."""
WORDS = (
    'The weather in Oslo: {"city": "Oslo", "days": [1, 2, 30], "ok": true, "note": "a \\"b\\" \\n c"}, '
    '"name": null. '
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["red", 'a "quoted" one', 3, None, {"deep": [1]}]},
    "integer": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 120}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "who": {
                "type": "object",
                "properties": {
                    "ok": {"type": "boolean"},
                    "id": {"type": "string", "pattern": "^[a-f]{2}-\\d$"},
                },
                "required": ["ok", "id"],
                "additionalProperties": False,
            },
            "kind": {"const": "x"},
        },
        "required": ["who"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 9}]},
        "minItems": 2,
        "maxItems": 5,
    },
    "string": {"type": "string", "minLength": 3, "maxLength": 20},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Bytes, control tokens and merges of JSON."""
    return Tokenizer.train([WORDS * 20], 340)


@pytest.fixture(scope="module")
def model(make_model: MakeModel, words: Tokenizer) -> GPT:
    """Its table is longer than the vocabulary, as those of published models are."""
    return make_model(vocab_size=words.vocab_size + 44, context=1024)


def ends(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset({tokenizer.end_of_text_id, tokenizer.control_ids["<|end|>"]})


def request(
    tokenizer: Tokenizer, grammar: Grammar | None, seed: int = 0, prompt: str = "Say:", **options: Any
) -> Request:
    sampling = Sampling(**{"max_new_tokens": 600, "temperature": 1.0, "seed": seed, **options})
    return Request(tuple(tokenizer.encode(prompt)), sampling, ends(tokenizer), grammar=grammar)


# ---- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_answer_satisfies_its_schema(model: GPT, words: Tokenizer, name: str) -> None:
    """Hot, cold and filtered; each control token and each id beyond the vocabulary would be likely without
    the grammar."""
    grammar = json_schema(words, ends(words), SCHEMAS[name])
    validator = jsonschema_rs.validator_for(SCHEMAS[name])
    outside = [*words.control_ids.values(), *range(words.vocab_size, words.vocab_size + 44)]
    bias = dict.fromkeys(outside, 20.0)
    requests = [request(words, grammar, seed) for seed in range(8)]
    requests += [request(words, grammar, seed, temperature=5.0, logit_bias=bias) for seed in range(8)]
    requests += [
        request(words, grammar, 1, temperature=0.0, logit_bias=bias),
        request(words, grammar, 1, top_k=2, top_p=0.5, min_p=0.1),
    ]
    answers = Engine(model, words).generate(requests)
    whole = [answer for answer in answers if answer.finish_reason == "stop"]
    assert (
        len(whole) >= len(answers) - 2
    )  # a random model may go on with a list, or with digits, up to the limit
    for answer in whole:
        validator.validate(json.loads(answer.text))
        assert not set(outside) & set(answer.ids[:-1])
        assert not set(outside) - ends(words) & set(answer.ids)
    assert len({answer.text for answer in whole}) > 3


def test_strings_are_escaped(model: GPT, words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), {"type": "string", "minLength": 30, "maxLength": 60})
    likely = {token: 6.0 for text in ('"', "\\", "\n", "/") for token in words.encode(text)}
    answers = Engine(model, words).generate(
        [request(words, grammar, seed, logit_bias=likely) for seed in range(12)]
    )
    said = [json.loads(answer.text) for answer in answers]
    assert all(30 <= len(text) <= 60 for text in said)
    assert (
        any('"' in text for text in said)
        and any("\\" in text for text in said)
        and any("\n" in text for text in said)
    )


def test_any_object(model: GPT, words: Tokenizer) -> None:
    likely = {token: 3.0 for text in ('"', "}") for token in words.encode(text)}
    grammar = json_object(words, ends(words))
    answers = Engine(model, words).generate(
        [request(words, grammar, seed, logit_bias=likely) for seed in range(10)]
    )
    whole = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]
    assert len(whole) >= 8
    assert all(isinstance(value, dict) for value in whole) and any(whole)


def test_white_space_does_not_go_on_for_ever(model: GPT, words: Tokenizer) -> None:
    likely = dict.fromkeys(words.encode(" ") + words.encode("\n"), 30.0)
    grammar = json_schema(words, ends(words), SCHEMAS["integer"])
    answer = Engine(model, words).generate([request(words, grammar, logit_bias=likely)])[0]
    assert answer.finish_reason == "stop" and "    " in answer.text and len(answer.ids) < 120


def test_regular_expressions(model: GPT, words: Tokenizer) -> None:
    pattern = "(ab|[0-9]{3})+-é?x"
    grammar = regex(words, ends(words), pattern)
    for answer in Engine(model, words).generate([request(words, grammar, seed) for seed in range(10)]):
        assert answer.finish_reason == "stop" and re.fullmatch(pattern, answer.text)
        assert not ends(words) & set(answer.ids)  # nothing can follow an x: there is no pass for an end token


def test_end_tokens_come_where_the_text_may_end_only(model: GPT, words: Tokenizer) -> None:
    grammar = regex(words, ends(words), "(ab)*c?")
    bias = dict.fromkeys(ends(words), 7.0) | {words.encode("c")[0]: 7.0}
    answers = Engine(model, words).generate(
        [request(words, grammar, seed, logit_bias=bias) for seed in range(30)]
    )
    assert {answer.ids[-1] in ends(words) for answer in answers} == {True, False}
    assert all(answer.text.removesuffix("c") == "ab" * (len(answer.text) // 2) for answer in answers)
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_an_end_that_is_text_ends_a_whole_answer_only(words: Tokenizer) -> None:
    letter, other = words.encode("b")[0], words.end_of_text_id
    matcher = regex(words, {letter, other}, "b?ab?").start()
    mask = np.zeros(words.vocab_size, dtype=np.bool_)
    matcher.allow(mask)
    assert mask.nonzero()[0].tolist() == words.encode("a")
    matcher.accept(words.encode("a")[0])
    matcher.allow(mask)
    assert set(mask.nonzero()[0].tolist()) == {letter, other} and not matcher.finished
    matcher.accept(letter)
    assert matcher.finished


def test_length_cuts(model: GPT, words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), {"type": "string", "minLength": 300})
    cut, whole = Engine(model, words).generate(
        [
            request(words, grammar, max_new_tokens=7),
            request(
                words,
                regex(words, ends(words), "a{7}"),
                max_new_tokens=7,
                logit_bias={words.encode("aa")[0]: -100.0},
            ),
        ]
    )
    assert (cut.finish_reason, len(cut.ids)) == ("length", 7)
    assert whole.finish_reason == "stop"


# ---- company -----------------------------------------------------------------------------------------------


def test_rows_without_a_grammar_are_left_alone(model: GPT, words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), SCHEMAS["nested"])
    free = [
        request(
            words,
            None,
            seed,
            f"Prompt {seed}",
            max_new_tokens=40,
            temperature=0.0 if seed == 2 else 1.0,
            top_p=0.9,
        )
        for seed in range(4)
    ]
    bound = [request(words, grammar, seed, f"Prompt {seed}") for seed in range(4)]
    mixed = [one for pair in zip(free, bound, strict=True) for one in pair]
    together = Engine(model, words).generate(mixed)
    for asked, answer in zip(mixed, together, strict=True):
        alone = Engine(model, words).generate([asked])[0]
        assert answer.ids == alone.ids and answer.finish_reason == alone.finish_reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_losing_pages_changes_nothing(model: GPT, words: Tokenizer, temperature: float) -> None:
    grammar = json_schema(words, ends(words), {"type": "string", "minLength": 60, "maxLength": 80})
    requests = [
        request(words, grammar, seed, f"Prompt {seed}", temperature=temperature, max_new_tokens=90)
        for seed in range(6)
    ]
    roomy = Engine(model, words).generate(requests)
    tight = Engine(model, words, cache_tokens=160)
    again = tight.generate(requests)
    assert tight.stats.preempted > 0
    assert [answer.ids for answer in again] == [answer.ids for answer in roomy]
    assert all(60 <= len(json.loads(answer.text)) <= 80 for answer in again if answer.finish_reason == "stop")


def test_greedy_takes_the_likeliest_that_is_allowed(model: GPT, words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), SCHEMAS["integer"])
    engine = Engine(model, words, lookup=8)
    answer = engine.generate([request(words, grammar, temperature=0.0)])[0]
    assert engine.stats.proposed == 0
    matcher, mask = grammar.start(), np.zeros(model.config.vocab_size, dtype=np.bool_)
    sequence = words.encode("Say:")
    for token in answer.ids:
        matcher.allow(mask)
        with torch.no_grad():
            logits = model(torch.tensor([sequence]))[0, -1]
        assert token == int(logits.masked_fill(~torch.from_numpy(mask), -torch.inf).argmax())
        matcher.accept(token)
        sequence.append(token)
    assert matcher.finished


def test_logprobs_are_those_before_the_grammar(model: GPT, words: Tokenizer) -> None:
    answer = Engine(model, words).generate(
        [request(words, regex(words, ends(words), "[a-m]{20}"), 3, top_k=5, temperature=0.8)]
    )[0]
    prompt = words.encode("Say:")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer.ids]]))[0, len(prompt) - 1 : -1]
    expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=BOUND, rtol=0)


def test_many_answers_share_a_grammar(model: GPT, words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), SCHEMAS["array"])
    requests = [request(words, grammar, seed) for seed in range(6)]
    assert hash(requests[0]) == hash(request(words, grammar, 0))
    together = Engine(model, words).generate(requests)
    assert [answer.ids for answer in together] == [
        Engine(model, words).generate([one])[0].ids for one in requests
    ]
    assert len({answer.text for answer in together}) > 1


def test_matchers_start_from_any_thread(words: Tokenizer) -> None:
    grammar = json_schema(words, ends(words), SCHEMAS["nested"])
    texts: list[bool] = []

    def walk() -> None:
        for _ in range(30):
            matcher, mask = grammar.start(), np.zeros(words.vocab_size, dtype=np.bool_)
            for token in words.encode('{"who": {"ok": true, "id": "ab-1"}}'):
                matcher.allow(mask)
                assert mask[token]
                matcher.accept(token)
            texts.append(matcher.finished)

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [True] * 120


def test_the_only_token_left_wins_whatever_number_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 2^24 the draw of a token is the one that never wins."""
    sampler = BatchSampler([Sampling()], [torch.Generator().manual_seed(0)], [[]], vocab_size=5)
    monkeypatch.setattr(sampler, "_race", lambda like: torch.full_like(like, torch.inf))
    allowed = torch.tensor([[False, False, True, False, False]])
    assert sampler(torch.zeros(1, 5), allowed)[0].tolist() == [2]


def test_filters_act_on_what_is_allowed() -> None:
    """The grammar comes before them: filters alone would have kept nothing that it allows."""
    logits = torch.tensor([[9.0, 8.0, 1.0, 2.0, -3.0]])
    allowed = torch.tensor([[False, False, True, True, True]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.99), Sampling(min_p=0.2)):
        kept = BatchSampler([sampling], [None], [[]], vocab_size=5).process(logits, allowed)
        assert torch.isfinite(kept[0]).tolist() == [False, False, True, True, False], sampling


# ---- dead ends ---------------------------------------------------------------------------------------------


class DeadEnd:
    """A grammar that allows three tokens and then none."""

    finished = False

    def __init__(self, trouble: Exception | None = None) -> None:
        self.trouble = trouble
        self.count = 0

    def start(self) -> DeadEnd:
        return DeadEnd(self.trouble)

    def allow(self, mask: np.ndarray) -> None:
        mask[:] = False
        mask[40 + self.count] = True
        if self.count == 3:
            raise self.trouble or UserError("nothing can come next")

    def accept(self, token: int) -> None:
        assert token == 40 + self.count
        self.count += 1


@pytest.mark.parametrize("trouble", [UserError("nothing can come next"), ValueError("a bug")])
def test_a_dead_end_fails_its_row_alone(model: GPT, words: Tokenizer, trouble: Exception) -> None:
    engine = Engine(model, words)
    bound = engine.submit(request(words, DeadEnd(trouble), max_new_tokens=20))
    free = engine.submit(request(words, None, 5, max_new_tokens=20))
    answer = free.result()
    assert answer.ids == Engine(model, words).generate([free.request])[0].ids
    with pytest.raises(UserError if isinstance(trouble, UserError) else RuntimeError, match=str(trouble)):
        bound.result()
    assert not engine.busy and engine.stats.new_tokens == len(answer.ids) + 3


def test_a_vocabulary_without_a_byte(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot write an é: what needs one fails, what could do without does not meet it."""
    bare = Tokenizer(words.backend)
    lost = bare.encode("é")
    pieces = [b"" if number in lost else piece for number, piece in enumerate(bare.spelling.data)]
    monkeypatch.setattr(bare.spelling, "data", pieces)
    matcher, mask = (
        json_schema(bare, ends(bare), {"const": "caf\u00e9"}).start(),
        np.zeros(bare.vocab_size, dtype=np.bool_),
    )
    for token in bare.encode('"caf'):
        matcher.allow(mask)
        assert mask[token]
        matcher.accept(token)
    with pytest.raises(UserError, match="cannot go on"):
        matcher.allow(mask)
    matcher = json_schema(bare, ends(bare), {"enum": ["caf\u00e9", "cafe"]}).start()
    for token in bare.encode('"cafe"'):
        matcher.allow(mask)
        assert mask[token] and not mask[lost].any()
        matcher.accept(token)
    assert matcher.finished


def test_a_tokenizer_that_changes_texts_keeps_to_the_grammar(words: Tokenizer, make_model: MakeModel) -> None:
    """One with a normaliser cannot write some texts as it would have to; single tokens can."""
    backend = tokenizers.Tokenizer.from_str(words.to_json())
    backend.normalizer = tokenizers.normalizers.Lowercase()
    lower = Tokenizer(backend)
    model = make_model(vocab_size=lower.vocab_size)
    answer = Engine(model, lower).generate(
        [request(lower, json_schema(lower, ends(lower), {"const": "Oslo IS Big"}))]
    )[0]
    assert (answer.text, answer.finish_reason) == ('"Oslo IS Big"', "stop")


# ---- bad and hostile schemas -------------------------------------------------------------------------------


def chain(count: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    links: dict[str, Any] = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def endless() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ([1], "must be an object, not list"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {}}, r'Unimplemented keys: \["not"\]'),
        ({"properties": [1]}, "properties must be an object"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "a" * (LONGEST_PATTERN + 1)}, "pattern of 513 characters"),
        ({"type": "object", "patternProperties": {"a" * 600: {}}}, "pattern of 600 characters"),
        ({"type": "string", "format": "riddle"}, "Unknown format"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "(?i)unsatisfiable"),
        ({"$ref": "#"}, "cannot be satisfied"),
        ({"$ref": "#/$defs/a"}, "leads to nothing"),
        ({"$ref": "https://example.com/schema.json"}, "not supported; only references into the schema"),
        (
            {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
            "not supported; only references into the schema",
        ),
        ({"properties": {"a": {"$id": "http://a/b", "$ref": "#/c"}}}, r"\$id"),
        ({"$dynamicRef": "#a"}, "not supported"),
        ({"minimum": float("nan")}, "number that JSON does not know"),
        ({"const": {1, 2}}, "type set"),
        ({"properties": {3: {}}}, "key that is not text"),
        ({"x-guidance": {"whitespace_pattern": ".*"}}, "x-guidance"),
        ({"description": "a" * LARGEST_SCHEMA}, "characters; at most"),
        ({"enum": [0] * (LARGEST_SCHEMA + 9)}, "more than|at most"),
        ({"properties": {f"p{n}": {} for n in range(2001)}}, "object of 2,001 properties"),
        (nested(70), "within each other"),
        (endless(), "within each other"),
        (
            chain(1000, lambda ref: {"type": "object", "properties": {"x": ref}, "required": ["x"]}),
            "references lead to",
        ),
        (chain(3000, lambda ref: ref), "references lead to|at most"),
        (
            {"allOf": [{"type": "string", "pattern": f".*a{n}.*"} for n in range(20)]},
            "may have to hold at once",
        ),
        (
            {
                "type": "string",
                "pattern": ".*a.*",
                "anyOf": [{"pattern": f".*{n}.*"} for n in range(JOINED_PATTERNS)],
            },
            "may have to hold",
        ),
    ],
)
def test_bad_schemas_are_refused_in_words(words: Tokenizer, schema: Any, said: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        json_schema(words, ends(words), schema)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert time.monotonic() - begun < 5


HOSTILE = """
import json, sys, threading, time
import numpy as np
from chatwright.config import UserError
from chatwright.generate.grammar import json_schema
from chatwright.memory import peak_memory_bytes
from chatwright.tokenizer import Tokenizer

def objects(properties):
    return {"type": "object", "properties": properties}

def text(pattern):
    return {"type": "string", "pattern": pattern}

SHAPES = {
    "objects": lambda: chain(260, lambda ref: {**objects({"x": ref}), "required": ["x"]}),
    "deep objects": lambda: chain(26, lambda ref: wrapped(ref, 14)),
    "all": lambda: chain(260, lambda ref: {"allOf": [ref, {"minimum": 1}]}),
    "any": lambda: chain(260, lambda ref: {"anyOf": [ref, {"const": 1}]}),
    "optional letters": lambda: {"type": "string", "pattern": "a?" * 256},
    "many": lambda: objects({f"p{n}": text("a?" * 200 + f"b.{{{n}}}") for n in range(200)}),
    "words": lambda: {"type": "string", "pattern": r"(\\p{L}?\\w?)" * 30},
    "repeats": lambda: {"type": "string", "pattern": "^((a{0,1000}){0,1000}){0,1000}$"},
    "classic": lambda: {"type": "string", "pattern": "^(a+)+$"},
    "states": lambda: {"type": "string", "pattern": ".*a.{300}b.*c.{300}"},
    "joined": lambda: {"allOf": [{"type": "string", "pattern": f".*a{n}.*"} for n in range(8)]},
    "properties": lambda: objects({f"p{n}": {"type": "string"} for n in range(2000)}),
    "enum": lambda: {"enum": [f"value {n}" for n in range(8000)]},
    "branches": lambda: {
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(60)]
    },
    "counts": lambda: {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}},
    "half a character": lambda: {"enum": [chr(0xD800)]},
}


def chain(count, link):
    links = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def wrapped(schema, depth):
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    return schema


def walk(name, rng):
    begun = time.monotonic()
    try:
        matcher = json_schema(tokenizer, ends, SHAPES[name]()).start()
        compiled, slowest = time.monotonic() - begun, 0.0
        mask = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        for _ in range(60):
            begun = time.monotonic()
            matcher.allow(mask)
            matcher.accept(int(rng.choice(mask.nonzero()[0])))
            slowest = max(slowest, time.monotonic() - begun)
            if matcher.finished:
                break
        return compiled, slowest
    except UserError as error:
        return time.monotonic() - begun, str(error)


def main():
    for name in SHAPES:
        results[name] = walk(name, np.random.default_rng(0))


tokenizer = Tokenizer.train(["a b c hello the world " * 50], 400)
ends, results = [tokenizer.end_of_text_id], {}
thread = threading.Thread(target=main)  # a server's threads have the smaller stacks
thread.start()
thread.join()
print(json.dumps([results, peak_memory_bytes() / 1e6]))
"""


def test_hostile_schemas_cost_little() -> None:
    """In a process of its own: what is not refused might end it."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results, megabytes = json.loads(done.stdout)
    assert len(results) == 16
    for name, (first, second) in results.items():
        assert first < 5, name  # to compile, or to fail
        assert isinstance(second, str) or second < 2, name  # to go on by a token
    assert megabytes < 2000  # without the limits: 3 GB for one mask


def test_other_grammars_are_refused_in_words(words: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"regular expression '\(' cannot be used: unclosed group"):
        regex(words, ends(words), "(")
    with pytest.raises(UserError, match="at most 512"):
        regex(words, ends(words), "a" * 513)
    with pytest.raises(UserError, match="the grammar cannot be used"):
        lark(words, ends(words), "start: nothing")
    for wrong in ([], [-1], [words.vocab_size]):
        with pytest.raises(UserError, match="needs ids that end"):
            json_object(words, wrong)


def test_without_the_library_the_error_names_it(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'chatwright\[serve\]'"):
        regex(words, ends(words), "a")


def test_the_engine_does_without_the_library() -> None:
    program = "import sys; import chatwright.generate.engine; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_what_was_compiled_is_kept_as_long_as_its_tokenizer(words: Tokenizer) -> None:
    own = Tokenizer(words.backend)
    vocabulary = grammar_module._vocabulary(own)
    one, two = json_object(own, ends(own)), json_object(own, [own.end_of_text_id])
    assert grammar_module._vocabulary(own) is vocabulary and len(vocabulary._compiled) == 1
    for number in range(40):
        regex(own, ends(own), f"a{number}")
    assert len(vocabulary._compiled) == grammar_module.REMEMBERED
    gc.collect()
    before = len(grammar_module._VOCABULARIES)
    del own, vocabulary, one, two
    gc.collect()
    assert len(grammar_module._VOCABULARIES) == before - 1


def test_completion_says_stop(model: GPT, words: Tokenizer) -> None:
    """Streams and completions agree about an answer that a grammar has ended."""
    pieces = list(Engine(model, words).stream(request(words, regex(words, ends(words), "[0-9]{4}"))))
    assert pieces[-1].finish_reason == "stop"
    whole: Completion = Engine(model, words).generate(
        [request(words, regex(words, ends(words), "[0-9]{4}"))]
    )[0]
    assert "".join(piece.text for piece in pieces) == whole.text and len(whole.text) == 4
