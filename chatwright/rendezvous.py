"""How the processes of one launch find each other, after a restart as well.

torchrun keeps one key-value store for all attempts of a launch. Processes that are started again would read
there what the dead ones have left - their network addresses - and connect to nobody. So they agree on a name
first that only the living can know, and keep everything else under it.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from chatwright.config import UserError

PATIENCE = 600.0
"""Seconds after which a process that nobody has joined gives up."""


def fresh_store() -> tuple[Any, int, int]:
    """The store of this attempt, this process's number, and how many there are. Raises UserError when some
    stay away."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    return PrefixStore(agree(store, rank, world), store), rank, world


def agree(store: Any, rank: int, world: int) -> str:
    """A name that all living processes have and no dead one had.

    Each tells the first one a word of its own; the first one repeats the words beside the name until all have
    answered with that name. A word or an answer that was left by the dead matches nothing.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + PATIENCE
    others = [str(number) for number in range(1, world)]
    if rank:
        store.set(f"hello/{rank}", word)
    while time.monotonic() < deadline:
        if rank:
            said = json.loads(_read(store, "welcome") or "{}")
            if said.get(str(rank)) == word:
                store.set(f"answer/{rank}", said["name"])
                return str(said["name"])
        else:
            words = {number: _read(store, f"hello/{number}") for number in others}
            store.set("welcome", json.dumps({"name": word, **words}))
            if all(_read(store, f"answer/{number}") == word for number in others):
                return word
        time.sleep(0.02)
    raise UserError(
        f"process {rank} waited {PATIENCE:.0f} seconds for all {world} processes; have some not been started?"
    )


def _read(store: Any, key: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else ""
