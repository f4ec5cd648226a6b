"""What the ranks of a start tell those of the next one, where torchrun starts a training again.

The store of torchrun outlives the workers, unless each start is given one of its own. A rank that ends by an exception
leaves a word there; one that is killed cannot, and that tells the two apart.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

#: Characters of an error that are passed on.
_LENGTH = 200


def restarts() -> int:
    """How often torchrun has started this training again; 0 without torchrun."""
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(number) if number.isdigit() else 0


def leave_word(topic: str, rank: int, words: str) -> None:
    """Tell the next start how this rank ends."""
    with contextlib.suppress(Exception):  # the store may be gone already
        _store().set(_key(topic, rank), words.partition("\n")[0][:_LENGTH])


def last_words(topic: str, count: int) -> dict[int, str]:
    """How the ranks of the last start ended, by rank, of those that could say so; they are told once."""
    found = {}
    with contextlib.suppress(Exception):
        store = _store()
        for key, rank in ((_key(topic, rank), rank) for rank in range(count)):
            if store.check([key]):
                found[rank] = store.get(key).decode()
                store.delete_key(key)
    return found


def how_it_ended(words: dict[int, str], count: int) -> str:
    """The end of the last start as a sentence; empty where nothing is known of it."""
    if not words:
        return ""
    silent = [rank for rank in range(count) if rank not in words]
    lost = f"rank {', '.join(map(str, silent))} left without a word" if silent else ""
    return "; ".join([*filter(None, [lost]), *(f"rank {rank}: {text}" for rank, text in words.items())])


def _key(topic: str, rank: int) -> str:
    return f"gradwatch/{topic}/left/{rank}"


def _store() -> Any:
    """The store without the prefix of this start."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.distributed_c10d.PrefixStore):
        store = store.underlying_store
    return store
