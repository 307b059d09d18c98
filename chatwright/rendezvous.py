"""Rendezvous: how the processes of one launch find each other, also after a restart.

torchrun keeps one key-value store for all attempts of a launch. Restarted processes would read the network
addresses of dead ones there, and fail to connect. So they first agree on a name that only living processes
know, and keep everything else under it.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from chatwright.config import UserError

PATIENCE = 600.0
"""Seconds that a process waits for the others."""


def fresh_store() -> tuple[Any, int, int]:
    """The store of this attempt, this process's rank, and the number of processes. Raises UserError when some
    do not join."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    return PrefixStore(agree(store, rank, world), store), rank, world


def agree(store: Any, rank: int, world: int) -> str:
    """A name that all living processes share and no dead one had.

    Each process sends a random word to rank zero. Rank zero publishes the name with all the words, until
    every process that found its own word there has answered with the name. Words and answers of dead
    processes match nothing.
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
