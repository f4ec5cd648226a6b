"""Whatever bytes are in the files of a run: it reads, or fails with an error of ours.

`GRADWATCH_FUZZ` and `GRADWATCH_FUZZ_SEED` set how often and which.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import GradwatchError
from gradwatch.reader import RunReader
from gradwatch.records import Finding, RunInfo
from gradwatch.storage.events import encode_event
from gradwatch.storage.store import Store
from tests.record.building import PARAMETERS, QuickDisk, batch_of

ROUNDS = int(os.environ.get("GRADWATCH_FUZZ", "600"))


def small_run(path: Path) -> None:
    """A sealed segment, a superseded one, an open one; events."""
    store = Store(path, RunInfo(PARAMETERS), disk=QuickDisk())
    store.append(batch_of(range(60), stats_every=10))
    store.end_segment()
    store.append(batch_of(range(40, 80), stats_every=10))
    store.end_segment()
    store.seal()
    store.append_events(encode_event("finding", Finding("f", "spike", "warning", 1, 2, layers=("a",)).to_json()))
    store.append(batch_of(range(80, 90), stats_every=5))
    store.append(batch_of(range(90, 100)))
    store.release()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with bits flipped, bytes replaced, cut, doubled, or moved."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        if not data:
            break
        place = draw.randrange(len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + 4] = draw.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
            )
        elif kind == 2:
            del data[place : place + draw.randrange(1, 64)]
        elif kind == 3:
            data[place:place] = data[place : place + draw.randrange(1, 64)]
        elif kind == 4:
            data[place:] = b""
        else:
            data[place : place + 8] = draw.randbytes(8)
    return bytes(data)


def read_all(path: Path) -> None:
    """Everything that a reader can be asked."""
    run = RunReader(path)
    _ = run.info, run.processes, run.steps, len(run), run.span, run.metric_names, run.statistic_names
    for _batch in run.batches():
        pass
    run.grad_norms(), run.metrics(), run.parameters(), run.findings(), run.actions(), run.marks()
    for statistic in ("grad_norm", "weight_norm", "metric"):
        run.rollup(10, statistic)
    run.statistic("activation_mean")
    run.refresh()


@pytest.mark.timeout(0 if ROUNDS > 1000 else 120)
def test_damaged_files_raise_only_errors_of_ours(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_run(whole)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file() and file.suffix != ".lock")
    shutil.copytree(whole, run)
    draw = random.Random(int(os.environ.get("GRADWATCH_FUZZ_SEED", "0")))  # noqa: S311 -- no secrets
    try:
        for number in range(ROUNDS):
            name = files[number % len(files)]
            (run / name).write_bytes(mutated((whole / name).read_bytes(), draw))
            try:
                with np.errstate(all="ignore"):
                    read_all(run)
            except GradwatchError:
                pass
            except Exception as error:
                raise AssertionError(f"round {number}: {name}") from error
            (run / name).write_bytes((whole / name).read_bytes())
    finally:
        logging.disable(logging.NOTSET)
