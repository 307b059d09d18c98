"""The command line: verb -> module:function, imported when it is used, and nothing else."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from chatwright.config import UsageError, UserError, fail, near_match

VERBS = {
    "run": ("chatwright.pipeline:main_run", "every stage of a recipe, from raw text to a chat model"),
    "data": ("chatwright.pipeline:main_data", "fetch, read and split data; `data list` shows the sources"),
    "tokenizer": ("chatwright.pipeline:main_stage", "train a byte-level BPE and write token shards"),
    "pretrain": ("chatwright.pipeline:main_stage", "train a language model on raw text"),
    "sft": ("chatwright.pipeline:main_stage", "fine-tune on conversations"),
    "reward": ("chatwright.pipeline:main_stage", "train a reward model on comparisons"),
    "classifier": (
        "chatwright.pipeline:main_stage",
        "train a classifier of texts, a judge in the reward model's place",
    ),
    "ppo": ("chatwright.pipeline:main_stage", "optimise answers against a reward model"),
    "reinforce": ("chatwright.pipeline:main_stage", "the same by REINFORCE: no critic, no clip; a yardstick"),
    "bestofn": (
        "chatwright.pipeline:main_stage",
        "the best of n answers by the reward model, for n = 1, 2, 4 ...; a yardstick",
    ),
    "eval": ("chatwright.pipeline:main_stage", "compare two chat models on held-out prompts"),
    "compare": (
        "chatwright.evaluate.compare:main_compare",
        "two runs side by side: settings, measures, curves, cost, answers",
    ),
    "generate": ("chatwright.serve.generate:main", "continue a text"),
    "chat": ("chatwright.serve.terminal:main", "talk to a model in the terminal"),
    "serve": ("chatwright.serve.server:main", "talk to a model in the browser; OpenAI-compatible API"),
    "key": ("chatwright.serve.operation.keys:main_key", "make an API key for a server"),
    "import": ("chatwright.serve.tools:main_import", "turn another format into a model directory"),
    "export": (
        "chatwright.serve.export:main_export",
        "write a model for transformers and vLLM, or for llama.cpp and Ollama",
    ),
    "plan": (
        "chatwright.serve.plan:main_plan",
        "predict a recipe's or a shape's memory and time before it runs",
    ),
    "doctor": ("chatwright.serve.doctor:main_doctor", "check a recipe or a model before the hours are spent"),
}


def usage() -> str:
    """What `chatwright --help` prints."""
    lines = [
        "usage: chatwright VERB [...]",
        "",
        "The road of the GPT lineage, from raw text to an aligned chat model.",
        "",
    ]
    lines += [f"  {verb:10} {text}" for verb, (_, text) in VERBS.items()]
    lines += ["", "chatwright VERB --help tells more. Exit codes: 0 done, 1 failed, 2 wrong arguments."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from chatwright import __version__

        print(f"chatwright {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            raise UsageError(f"no verb is called {verb!r}{near_match(verb, list(VERBS))}")
        module, _, name = VERBS[verb][0].partition(":")
        function = getattr(importlib.import_module(module), name)
        return int(function(verb, rest) if name == "main_stage" else function(rest))
    except UserError as error:
        return fail(error, debug=debug)
    except KeyboardInterrupt:
        print("chatwright: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read has left. What is still in the buffer must not fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
