"""lm-eval against a server: lm_eval_asks.py URL MODEL TOKENIZER TASKS. Prints what it got, as JSON.

TASKS is a folder with task files. Every form of request: ids and texts, one and several in a request, one and
several clients.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

url, name, tokenizer, folder = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)


def samples(model: str, names: list[str], *, chat: bool = False, **arguments: Any) -> dict[str, Any]:
    """Task -> its samples: what was asked and what came back."""
    done = lm_eval.simple_evaluate(
        model=model,
        model_args={"model": name, "max_length": 256, "max_retries": 1, **arguments},
        tasks=names,
        task_manager=tasks,
        log_samples=True,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return {
        task: [
            {"doc": one["doc_id"], "asked": [list(pair) for pair in one["arguments"]], "got": one["resps"]}
            for one in rows
        ]
        for task, rows in done["samples"].items()
    }


completions = {"base_url": f"{url}/v1/completions", "tokenizer": tokenizer}
chat = {"base_url": f"{url}/v1/chat/completions", "num_concurrent": 2}
found = {
    f"{'ids' if ids else 'texts'}, {batch} in a request, {clients} clients": samples(
        "local-completions",
        ["tiny_choice", "tiny_text", "tiny_rolling", "tiny_said"],
        tokenized_requests=ids,
        batch_size=batch,
        num_concurrent=clients,
        **completions,
    )
    for ids, batch, clients in ((True, 1, 1), (True, 4, 1), (True, 1, 5), (False, 1, 1), (False, 3, 4))
}
found["chat"] = samples("local-chat-completions", ["tiny_said"], chat=True, **chat)
print(json.dumps(found, default=str))
