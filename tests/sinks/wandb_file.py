"""Reads what a run of Weights & Biases leaves on disk when it is offline."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(folder: Path) -> list[Any]:
    """The records of the one run below a folder, once its last is there: W&B's own process writes after `finish`."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(500):
        found = []
        for data in _entries(file.read_bytes()):
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise AssertionError(f"no end in {file}")


def _entries(data: bytes) -> Iterator[bytes]:
    """The entries of a log of LevelDB behind seven bytes: blocks of 32 KiB, entries in pieces."""
    block, place, entry = 32768, 7, b""
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        entry += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield entry
            entry = b""
