"""Short campaigns of `benchmarks/fuzz.py`: whatever is in the files of a run, it reads or fails with our errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from gradwatch.reader import RunReader


@pytest.fixture
def target(tmp_path: Path) -> Iterator[fuzz.Target]:
    logging.disable(logging.CRITICAL)
    yield fuzz.Target(tmp_path)
    logging.disable(logging.NOTSET)


def test_files_damaged_by_chance_raise_only_errors_of_ours(target: fuzz.Target) -> None:
    fuzz.by_chance(target, 200, 0, target.read_with)


def test_files_damaged_by_hypothesis_raise_only_errors_of_ours(target: fuzz.Target) -> None:
    fuzz.by_hypothesis(target, 40, 0, target.read_with)


@pytest.mark.parametrize("value", ["x", {"x": 1}, 1 << 70], ids=repr)
def test_an_event_with_a_value_of_another_type_is_left_out(target: fuzz.Target, value: Any) -> None:
    events = map(json.loads, target.files["events.jsonl"].splitlines())
    for event in (event for event in events if event["kind"] in ("finding", "action")):
        odd = [json.dumps({**event, "id": str(i), key: value}) + "\n" for i, key in enumerate(event)]
        (target.run / "events.jsonl").write_text(json.dumps(event) + "\n" + "".join(odd))
        run = RunReader(target.run)

        assert len(run.findings()) + len(run.actions()) >= 1
