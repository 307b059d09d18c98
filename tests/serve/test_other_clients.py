"""Clients that come with many packages of their own: LiteLLM, instructor, openai-agents, lm-eval.

They run in an environment of their own (`make clients`), or in this one where they are installed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.serving import DIALOGUES, Running

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OWN = Path(os.environ.get("CHATWRIGHT_CLIENTS", ROOT / ".venv-clients"))
"""The environment that `make clients` makes."""


@functools.cache
def interpreter(module: str) -> str | None:
    """The Python that has a module."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    for found in (OWN / "bin" / "python", OWN / "Scripts" / "python.exe", Path(sys.executable)):
        if found.exists() and subprocess.run([found, "-c", probe]).returncode == 0:
            return str(found)
    return None


def run(program: str, module: str, *arguments: str | Path) -> Any:
    """The JSON that a program of tests/serve/programs prints last."""
    python = interpreter(module)
    if python is None:
        pytest.skip(f"{module} is not installed (make clients): NOT covered here")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    told = subprocess.run(
        [python, HERE / "programs" / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**clean, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""},
    )
    assert told.returncode == 0, told.stderr[-6000:]
    return json.loads(told.stdout.splitlines()[-1])


def test_litellm(roomy_server: Running) -> None:
    found = run("litellm_asks.py", "litellm", roomy_server.url, "tiny/taught")
    assert found["whole"] == found["streamed"] == DIALOGUES["hello"]
    assert json.loads(found["shaped"])["town"] in ("Oslo", "Rome")
    assert found["call"]
    assert all(json.loads(one)["town"] in ("Oslo", "Rome") for one in found["call"])
    assert found["after"] in ("length", "stop", "tool_calls")
    assert found["likely"] == len(roomy_server.model.tokenizer.encode(DIALOGUES["hello"]))
    assert found["vectors"] == 2
    assert found["text"] == roomy_server.model.generate("Once", max_new_tokens=4, temperature=0.0)
    assert found["refused"] == "ContextWindowExceededError"


def test_instructor(roomy_server: Running) -> None:
    found = run("instructor_asks.py", "instructor", roomy_server.url, "tiny/taught")
    assert {"TOOLS", "JSON_SCHEMA"} <= set(found)
    for mode, mood in found.items():
        assert mood["tries"] == 3, mode  # two answers were sent back with what was wrong
        assert mood["mood"] in ("good", "bad")


def test_openai_agents(roomy_server: Running) -> None:
    found = run("agents_ask.py", "agents", roomy_server.url, "tiny/taught")
    assert len(found) == 2
    for kind, told in found.items():
        assert len(told["called"]) == 2, kind
        assert told["turns"] == 2
        assert told["final"] == f"sunny in {told['called'][-1]}"
        assert told["plain"] == DIALOGUES["hello"]


# ---- lm-eval -----------------------------------------------------------------------------------------------

DOCUMENTS = [
    {"question": question, "choices": [f" {answer}", " Hello", " no ☃"], "answer": 0, "said": answer}
    for question, answer in DIALOGUES.items()
    if len(answer) < 60
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
        "target_delimiter": "",
    },
    "tiny_text": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{said}}",
        "metric_list": [{"metric": "perplexity"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{said}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_said": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["!", "\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Task files for lm-eval, and their documents."""
    folder.mkdir()
    data = folder / "documents.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    files = {"data_files": {"test": str(data)}}
    source = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, server: Running) -> Path:
    """The model's tokenizer as transformers reads it."""
    folder.mkdir()
    server.model.tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def score(server: Running, ids: Sequence[int], known: int) -> tuple[float, bool]:
    """What lm-eval wants to know of ids of which the first `known` are given, from the plain model: the
    log-probability of the others, and whether greedy decoding would choose them."""
    table = server.model.logits([ids])[0].log_softmax(-1)[known - 1 : -1]
    wanted = torch.tensor(ids[known:])
    return table.gather(1, wanted[:, None]).sum().item(), bool((table.argmax(-1) == wanted).all())


def check_pair(server: Running, form: str, context: str, text: str, got: Sequence[Any]) -> None:
    """Compare lm-eval's score of a text behind a context with the plain model's.

    Ids reach the model as they are. In front of a text that is sent as such the
    server puts the end-of-text token.
    """
    tokenizer = server.model.tokenizer
    begin = [tokenizer.end_of_text_id] if form.startswith("texts") else []
    spaces = len(context) - len(context.rstrip())
    context, text = context[: len(context) - spaces], context[len(context) - spaces :] + text
    known = len(begin) + len(tokenizer.encode(context))
    number, greedy = score(server, [*begin, *tokenizer.encode(context + text)], known)
    assert float(got[0]) == pytest.approx(number, abs=1e-3), (form, context, text)
    assert str(got[1]) == str(greedy), (form, context, text)


def test_lm_eval(server: Running, tmp_path: Path) -> None:
    tasks, tokenizer = write_tasks(tmp_path / "tasks"), write_tokenizer(tmp_path / "tokenizer", server)
    found = run("lm_eval_asks.py", "lm_eval", server.url, "tiny/taught", tokenizer, tasks)
    chat = found.pop("chat")
    assert len(found) == 5
    for form, asked in found.items():
        compared = 0
        for sample in [*asked["tiny_choice"], *asked["tiny_text"]]:
            for (context, text), got in zip(sample["asked"], sample["got"], strict=True):
                check_pair(server, form, context, text, got[0])
                compared += 1
        assert compared == 4 * len(DOCUMENTS)
        for sample in asked["tiny_rolling"]:
            ((text,),) = sample["asked"]
            ids = [server.model.tokenizer.end_of_text_id, *server.model.tokenizer.encode(text)]
            (got,) = sample["got"]
            number = got[0][0] if isinstance(got[0], list) else got[0]
            assert float(number) == pytest.approx(score(server, ids, 1)[0], abs=1e-3), form
        for sample in asked["tiny_said"]:
            question, said = sample["asked"][0][0], sample["got"][0][0]
            if form.startswith("texts"):
                stops = ("!", "\n", "<|endoftext|>")
                own = server.model.generate(question, max_new_tokens=12, temperature=0.0, stop=stops)
                assert said == own, form
    answers = {sample["doc"]: sample["got"][0][0] for sample in chat["tiny_said"]}
    assert answers[0] == DIALOGUES["hello"].partition("!")[0]
