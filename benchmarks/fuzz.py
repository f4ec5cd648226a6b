"""Damaged files: whatever bytes are in them, a run reads, or fails with an error of ours. Prints a table, writes JSON.

    python -m benchmarks.fuzz --rounds 60000 --engine random
    python -m benchmarks.fuzz --rounds 20000 --engine hypothesis
    python -m benchmarks.fuzz --rounds 20000 --engine atheris     # pip install atheris

`random` flips, cuts and moves bytes; `hypothesis` does so too, and puts odd values into the JSON; `atheris` follows the
lines of gradwatch that a file reaches. A worker with little memory reads the files; whoever waits for it counts the
rounds in which it dies, hangs, needs much memory, or raises what is not in `errors.py`, and keeps their files.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import mmap
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from gradwatch.errors import GradwatchError
from gradwatch.reader import RunReader
from gradwatch.records import ActionRecord, Finding, RunInfo, Samples, StepBatch
from gradwatch.storage.events import encode_event
from gradwatch.storage.store import Store
from gradwatch.testing import synthetic_batches, synthetic_parameters

#: Seconds after which a round counts as a hang; MB that a round may need; MB of addresses that a worker may add.
PATIENCE, MOST_MB, ADDRESSES_MB = 60, 128, 1024
ENGINES = ("random", "hypothesis", "atheris")
PARAMETERS = synthetic_parameters(4)
MODULES = ("act.0", "act.1")
#: What the progress file holds: rounds, begin of the present one (ns), errors of ours, the highest peak (MB).
_PROGRESS = struct.Struct("4q")


def small_run(path: Path) -> None:
    """A sealed segment, a superseded one, two open batches; events of each kind."""
    store = Store(path, RunInfo(PARAMETERS, modules=MODULES, config={"flush_every": 50}))
    for first, stop in ((0, 60), (40, 80)):
        store.append(_rows(first, stop))
        store.end_segment()
    store.seal()
    finding = Finding("f", "spike", "warning", 1, 2, layers=("layers.0",), advice=("clip",))
    store.append_events(encode_event("finding", finding.to_json()))
    store.append_events(encode_event("action", ActionRecord("a", 3, "Clip", reason="spike").to_json()))
    store.append_events(encode_event("mark", {"name": "note", "text": "half of it", "step": 50}))
    store.append(_rows(80, 90))
    store.append(_rows(90, 100))
    store.release()


def _rows(first: int, stop: int) -> StepBatch:
    steps, names = stop - first, ["weight_norm"]
    batch = next(synthetic_batches(steps=steps, parameters=PARAMETERS, statistics=names, first_step=first))
    rows = batch.statistics["weight_norm"].rows
    sampled = {**batch.statistics, "activation_mean": Samples(rows, np.ones((len(rows), 2), np.float32))}
    return dataclasses.replace(batch, statistics=sampled, modules=MODULES)


def read_all(path: Path) -> RunReader:
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
    return run


class Target:
    """A run whose files are damaged one at a time.

    Args:
        folder: Where it lies; a run that is there already is taken as it is.
    """

    def __init__(self, folder: Path) -> None:
        whole, self.run = folder / "whole", folder / "run"
        if not whole.exists():
            small_run(whole)
        files = sorted(file for file in whole.rglob("*") if file.is_file() and file.suffix != ".lock")
        self.files = {str(file.relative_to(whole)): file.read_bytes() for file in files}
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(whole, self.run)

    def read_with(self, name: str, content: bytes) -> list[str]:
        """Read the run with this content in one of its files; returns what the reader says of the damage.

        Raises:
            Exception: What is no error of ours.
        """
        place = self.run / name
        place.write_bytes(content)
        try:
            with np.errstate(all="ignore"):
                return [*read_all(self.run).damage.values()]
        except GradwatchError as error:
            return [str(error)]
        finally:
            place.write_bytes(self.files[name])


# -- what is done to a file --------------------------------------------------------------------------------------------

#: Numbers at which lengths and offsets go wrong.
_ODD = (0, 1, -1, 127, 255, 1 << 15, (1 << 31) - 1, -(1 << 31), (1 << 62) + 1, (1 << 63) - 1)


def edited(content: bytes, kind: int, place: float, amount: int) -> bytes:
    """The content with one thing done to it.

    Args:
        content: Of a file.
        kind: What is done, 0 to 7.
        place: Where, as a share of the length.
        amount: How much of it: a bit, a byte, a length or a number.
    """
    at = int(place * len(content))
    head, tail = content[:at], content[at:]
    span = 1 + amount % 64
    return [
        lambda: head + bytes([tail[0] ^ (1 << amount % 8)]) + tail[1:] if tail else content,
        lambda: head + bytes([amount % 256]) + tail[1:],
        lambda: head + tail[span:],
        lambda: head + tail[:span] + tail,
        lambda: head,
        lambda: head + content[amount % (len(content) or 1) :][:span] + tail[span:],
        lambda: head + struct.pack("<q", _ODD[amount % len(_ODD)]) + tail[8:],
        lambda: head + struct.pack("<i", _ODD[amount % len(_ODD)] % (1 << 32) - (1 << 31)) + tail[4:],
    ][kind]()


def by_chance(target: Target, rounds: int, seed: int, read: Callable[[str, bytes], object]) -> None:
    """Random edits, one to thirty to a file."""
    draw = random.Random(seed)  # noqa: S311 -- no secrets
    names = list(target.files)
    for number in range(rounds):
        name = names[(seed + number) % len(names)]
        content = target.files[name]
        for _ in range(draw.choice([1, 1, 2, 5, 30])):
            content = edited(content, draw.randrange(8), draw.random(), draw.randrange(1 << 16))
        read(name, content)


def by_hypothesis(target: Target, rounds: int, seed: int, read: Callable[[str, bytes], object]) -> None:
    """Edits that Hypothesis draws; files of JSON also with odd values at odd places."""
    import hypothesis
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(_ODD)
    values = st.recursive(
        leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
    )
    edits = st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1), st.integers(0, 1 << 16)), min_size=1, max_size=8)
    changes = st.lists(st.tuples(st.integers(0, 200), values), min_size=1, max_size=3)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=rounds, database=None, deadline=None, suppress_health_check=[*hypothesis.HealthCheck]
    )
    @hypothesis.given(st.sampled_from(sorted(target.files)), edits, changes, st.booleans())
    def attempt(name: str, edits: list[Any], changes: list[Any], as_json: bool) -> None:
        content = target.files[name]
        if as_json and name.endswith((".json", ".jsonl")):
            content = b"".join(_changed(line, changes) for line in content.splitlines(keepends=True))
        else:
            for edit in edits:
                content = edited(content, *edit)
        read(name, content)

    attempt()


def _changed(text: bytes, changes: list[tuple[int, Any]]) -> bytes:
    """A JSON text with other values at some places, counted in the order of the text."""
    tree = json.loads(text)
    for number, value in changes:
        places = list(_places(tree))
        node, key = places[number % len(places)]
        node[key] = copy.deepcopy(value)
    return json.dumps(tree).encode() + b"\n"


def _places(tree: Any) -> Any:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def by_atheris(target: Target, rounds: int, seed: int, read: Callable[[str, bytes], object]) -> None:
    """One file, by the seed; variants that reach new lines of gradwatch are changed further."""
    import atheris

    name = list(target.files)[seed % len(target.files)]
    corpus = target.run.parent / f"corpus-{seed}"
    corpus.mkdir()
    (corpus / "whole").write_bytes(target.files[name])
    limits = [f"-atheris_runs={rounds + 2}", "-max_len=20000", "-rss_limit_mb=0", f"-timeout={10 * PATIENCE}"]
    settings = [sys.argv[0], *limits, f"-seed={seed + 1}", "-verbosity=0", str(corpus)]
    atheris.Setup(settings, lambda data: read(name, data))
    atheris.Fuzz()


# -- the worker --------------------------------------------------------------------------------------------------------


def work(engine: str, rounds: int, seed: int, folder: Path) -> None:
    """Read damaged files, and note what should not be."""
    logging.disable(logging.CRITICAL)
    target = Target(folder)
    for _ in range(2):
        read_all(target.run)
    addresses = _status("VmSize") + ADDRESSES_MB
    resource.setrlimit(resource.RLIMIT_AS, (addresses << 20, addresses << 20))
    with (folder / "progress").open("r+b") as file:
        progress = mmap.mmap(file.fileno(), _PROGRESS.size)
    count = refused = peak = 0

    def read(name: str, content: bytes) -> None:
        nonlocal count, refused, peak
        _PROGRESS.pack_into(progress, 0, count, time.monotonic_ns(), refused, peak)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        try:
            damage = target.read_with(name, content)
        except Exception:  # noqa: BLE001 -- what we look for
            damage = []
            _note(folder, "raised", name, content, traceback.format_exc())
        needed = _status("VmHWM") - before
        refusals = [text for text in damage if "malloc of size" in text or "Unable to allocate" in text]
        if needed > MOST_MB or refusals:
            _note(folder, "memory", name, content, f"{needed} MB; {refusals}")
        count, refused, peak = count + 1, refused + bool(damage), max(peak, needed)
        _PROGRESS.pack_into(progress, 0, count, time.monotonic_ns(), refused, peak)

    {"random": by_chance, "hypothesis": by_hypothesis, "atheris": by_atheris}[engine](target, rounds, seed, read)


def _status(field: str) -> int:
    """A line of /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{field}:")[2].split(maxsplit=1)[0]) >> 10


def _note(folder: Path, what: str, name: str, content: bytes, text: str) -> None:
    """Keep a case, and one line of it."""
    kept = folder / "kept"
    kept.mkdir(exist_ok=True)
    number = len(list(kept.iterdir()))
    (kept / f"{number}-{what}-{name.replace('/', '-')}").write_bytes(content)
    with (folder / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, "file": name, "case": number, "text": text[-1500:]}) + "\n")


# -- whoever waits for it ----------------------------------------------------------------------------------------------


_GUIDED = """
import atheris
with atheris.instrument_imports(["gradwatch"]):
    import benchmarks.fuzz
benchmarks.fuzz.main()
"""
#: How a worker starts: one that is guided must see the imports.
_START = dict.fromkeys(ENGINES, ("-m", "benchmarks.fuzz")) | {"atheris": ("-c", _GUIDED)}


def campaign(engine: str, rounds: int, seed: int, folder: Path, *, minutes: float = 1e6) -> dict[str, Any]:
    """So many rounds, or as many as fit into the time, in as many workers as it takes."""
    done = refused = peak = workers = 0
    # Atheris keeps to one file.
    share = -(-rounds // len(Target(folder).files)) if engine == "atheris" else rounds
    progress = folder / "progress"
    begin = time.monotonic()
    end = begin + 60 * minutes
    while done < rounds and time.monotonic() < end:
        progress.write_bytes(bytes(_PROGRESS.size))
        code = [sys.executable, *_START[engine], "--worker", str(folder), "--engine", engine]
        code += ["--rounds", str(min(share, rounds - done)), "--seed", str(seed + workers)]
        worker, workers = subprocess.Popen(code), workers + 1  # noqa: S603
        while worker.poll() is None:
            time.sleep(0.2)
            since = _PROGRESS.unpack(progress.read_bytes())[1]
            if time.monotonic() > end or (since and time.monotonic_ns() - since > PATIENCE * 1e9):
                worker.kill()
        count, since, refusals, most = _PROGRESS.unpack(progress.read_bytes())
        if worker.returncode and time.monotonic() < end:
            count += 1
            what = "hung" if time.monotonic_ns() - since > PATIENCE * 1e9 else "died"
            damaged = _damaged(folder)
            _note(folder, what, damaged[0], damaged[1], f"{what}: {_cause(worker.returncode)}")
        elif not (count or worker.returncode):
            raise RuntimeError(f"the worker of {engine!r} did nothing")
        done, refused, peak = done + count, refused + refusals, max(peak, most)
    notes = folder / "notes.jsonl"
    found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    counts = {what: sum(note["what"] == what for note in found) for what in ("raised", "died", "hung", "memory")}
    return {
        "engine": engine,
        "rounds": done,
        "damage noticed": refused,
        **counts,
        "peak MB": peak,
        "seconds": round(time.monotonic() - begin),
        "notes": found[:20],
    }


def _damaged(folder: Path) -> tuple[str, bytes]:
    """The file that a worker left damaged when it died."""
    run, whole = folder / "run", folder / "whole"
    for file in sorted(file for file in whole.rglob("*") if file.is_file() and file.suffix != ".lock"):
        name = str(file.relative_to(whole))
        if (run / name).read_bytes() != file.read_bytes():
            return name, (run / name).read_bytes()
    return "none", b""


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def main() -> int:
    """Run one engine; 1 when anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="random")
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="where the files of what was found go")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.engine, options.rounds, options.seed, options.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(options.engine, options.rounds, options.seed, Path(folder), minutes=options.minutes)
        if options.keep and (Path(folder) / "kept").exists():
            shutil.copytree(Path(folder) / "kept", options.keep, dirs_exist_ok=True)
    print(json.dumps(found, indent=1))
    out = Path(f"benchmarks/results/fuzz-{options.engine}.json")
    packages = ("hypothesis",) if options.engine == "hypothesis" else ()
    out.write_text(json.dumps({**machine(*packages), "seed": options.seed, **found}, indent=1) + "\n")
    return 1 if any(found[what] for what in ("raised", "died", "hung", "memory")) else 0


if __name__ == "__main__":
    sys.exit(main())
