"""What a crash leaves of a run: kills, faults of the disk, cut files, power cuts. Prints a table, writes JSON.

    python -m benchmarks.crash --kills 500

Every number of these runs follows from its step, so each recorded value is checked, not only counted. Short campaigns
of the same kind are in `tests/record`.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from gradwatch.errors import GradwatchError
from gradwatch.reader import RunReader
from gradwatch.records import Finding, Parameter, RunInfo, Samples, StepBatch
from gradwatch.storage import recorder, store, trouble
from gradwatch.storage.disk import Disk
from gradwatch.writer import RunWriter

PARAMETERS = tuple(Parameter(f"layers.{i}.weight", depth=i) for i in range(20))
FLUSH_EVERY = 50
_PLACE = np.arange(len(PARAMETERS))


def norms_of(steps: Any) -> Any:
    """The norms that belong to steps, shape (n, p)."""
    return ((np.asarray(steps)[:, None] * 31 + _PLACE * 17) % 997 + 1).astype(np.float32)


def row_of(step: int) -> StepBatch:
    """One step, with what belongs to it."""
    norms = norms_of([step])
    sampled = {"weight_norm": Samples(np.array([0]), norms + 1)} if step % 10 == 0 else {}
    return StepBatch(PARAMETERS, np.array([step]), norms, {"loss": np.array([float(step)])}, sampled)


@dataclass
class Outcome:
    """What a campaign found.

    Args:
        campaign: Its name.
        rounds: Crashes or faults.
        unreadable: Directories that did not open.
        wrong: Runs whose steps were no prefix, or whose values were not those written.
        lost_recorded: Steps that were in the record after one crash and not after a later one.
        longest_tail: Most steps that were handed over and not found after the crash.
        raised: Exceptions in the training loop.
        notes: What went wrong, in words; and numbers of the campaign's own.
    """

    campaign: str
    rounds: int = 0
    unreadable: int = 0
    wrong: int = 0
    lost_recorded: int = 0
    longest_tail: int = 0
    raised: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost but tails."""
        return not (self.unreadable or self.wrong or self.lost_recorded or self.raised)

    def check(self, path: Path, *, handed: int = 0, known: int = 0, gaps: bool = False) -> int:
        """Look at what a crash left; returns how many steps are there.

        Args:
            path: The run.
            handed: Steps that the training had handed over.
            known: Steps that were there before.
            gaps: Beyond those, any may be missing, not only the last.
        """
        self.rounds += 1
        try:
            run = RunReader(path)
            steps = run.steps
            values = [run.values("grad_norm"), run.values("weight_norm")]
            losses = run.metrics()["loss"].to_numpy()
            findings = run.finding_list()
        except Exception as error:  # noqa: BLE001 -- any exception is what we look for
            self.unreadable += 1
            self.notes.append(f"round {self.rounds}: {type(error).__name__}: {error}")
            return known
        first = known if gaps else len(steps)
        right = steps[:first].tolist() == list(range(first)) and np.array_equal(losses, steps)
        right &= bool((np.diff(steps) > 0).all())
        for add, (taken, norms, _) in enumerate(values):
            right &= np.array_equal(norms, norms_of(taken) + add)
        # An event may be part of the lost tail; one that is there comes never before its step.
        at = [finding.first_step for finding in findings]
        right &= at == sorted(set(at)) and all(step % 25 == 0 and step in steps for step in at)
        if not right or run.damage:
            self.wrong += 1
            self.notes.append(f"round {self.rounds}: steps {steps[:3]}..{steps[-3:]}, damage {run.damage}")
        self.lost_recorded += max(0, known - len(steps))
        self.longest_tail = max(self.longest_tail, handed - len(steps))
        return len(steps)


# -- kills -------------------------------------------------------------------------------------------------------------


class DeadlyDisk(Disk):
    """Kills its process at one of its operations: before it, in the middle of it, or after it."""

    #: At how many operations from the start; None for never.
    fatal: int | None = None
    count = 0

    def _operation(self) -> None:
        type(self).count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def append(self, file: int, data: bytes) -> None:
        self._operation()
        super().append(file, data[: len(data) // 2])
        self._operation()
        super().append(file, data[len(data) // 2 :])
        self._operation()

    def truncate(self, file: int, size: int) -> None:
        self._operation()
        super().truncate(file, size)

    def replace(self, path: Path, data: Any) -> None:
        view = memoryview(data)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            self._operation()
            file.write(view[: len(view) // 2])
            file.flush()
            self._operation()
            file.write(view[len(view) // 2 :])
        self._operation()
        temporary.replace(path)
        self._operation()

    def remove(self, path: Path) -> None:
        self._operation()
        super().remove(path)
        self._operation()


def train(path: str, counter: str, settings: dict[str, Any]) -> None:
    """The child: records steps until it is killed, and keeps count of them where the parent sees it.

    Segments are a few hundred rows, so that sealing, renaming and rolling up go on nearly all the time.
    """
    store.SEAL_ROWS = settings["seal_rows"]
    recorder.SYNC = recorder.HEARTBEAT = 0.05
    DeadlyDisk.fatal = settings["fatal"]
    RunWriter.disk_type = DeadlyDisk
    with Path(counter).open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 16)
    writer = RunWriter(path, RunInfo(PARAMETERS), resume=True, flush_every=FLUSH_EVERY, flush_seconds=0.2)
    step = writer.next_step
    while step < settings["until"]:
        try:
            writer.write(row_of(step))
            if step % 25 == 0:
                finding = Finding(f"spike-{step}", "spike", "critical", step, step)
                writer.event("finding", finding.to_json(), sync=step % 50 == 0)
        except Exception:  # noqa: BLE001 -- counted: none may reach the training loop
            shared[8:16] = struct.pack("q", struct.unpack("q", shared[8:16])[0] + 1)
        step += 1
        shared[:8] = struct.pack("q", step)
        time.sleep(settings["pause"])
    writer.close()


def kill_campaign(rounds: int, *, seed: int = 0, at_operations: bool = False, folder: Path) -> Outcome:
    """Kill a recording process again and again, and go on with the same run; a fresh one after every ten.

    Args:
        rounds: How many kills.
        seed: Of the moments.
        at_operations: Kill at operations on files, one after the other, instead of at random moments.
        folder: Where to work.
    """
    outcome = Outcome("kills at every operation" if at_operations else "kills at random moments")
    draw = random.Random(seed)  # noqa: S311 -- no secrets
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__" if __name__ == "__main__" else "benchmarks.crash"])
    counter = folder / "counter"
    counter.write_bytes(bytes(16))
    known, run = 0, folder / "run"
    while outcome.rounds < rounds:
        if outcome.rounds % 10 == 0:
            known, run = 0, folder / f"run-{outcome.rounds}"
        settings = {"seal_rows": draw.choice([60, 150, 400]), "pause": 0.001, "until": 1 << 40, "fatal": None}
        if at_operations:
            settings |= {"fatal": 1 + outcome.rounds % 120}
        counter.write_bytes(struct.pack("qq", known, 0))
        child = context.Process(target=train, args=(str(run), str(counter), settings))
        child.start()
        if not at_operations:
            wait_for_start(run, counter, known)
            time.sleep(draw.uniform(0, 0.8))
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join(60)
        if child.exitcode != -signal.SIGKILL:
            outcome.notes.append(f"round {outcome.rounds + 1}: the child ended with {child.exitcode}")
            outcome.raised += 1
            child.kill()
        child.close()
        handed, raised = struct.unpack("qq", counter.read_bytes())
        outcome.raised += raised
        if not (run / "run.json").exists():  # killed before there was a run: nothing may be there but the lock
            outcome.rounds += 1
            outcome.unreadable += bool({p.name for p in run.glob("*")} - {"writer.lock", "run.json.tmp"})
            continue
        known = max(known, outcome.check(run, handed=handed, known=known))
    return outcome


def wait_for_start(run: Path, counter: Path, known: int) -> None:
    """Return when the child has handed over its first step."""
    deadline = time.monotonic() + 60
    while struct.unpack("q", counter.read_bytes()[:8])[0] <= known and time.monotonic() < deadline:
        time.sleep(0.002)
    if not (run / "run.json").exists():
        raise TimeoutError("the child did not start")


# -- truncation --------------------------------------------------------------------------------------------------------


def truncation_campaign(folder: Path) -> Outcome:
    """Cut every file of a run at every byte of what was added last; and at some bytes, or all, before."""
    outcome = Outcome("every file cut at every byte of its last batch")
    run = folder / "run"
    written = write_steps(run, 320, seal_at=150)
    whole = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for file, content in whole.items():
        for size in sizes_to_cut(file, content):
            file.write_bytes(content[:size])
            _check_cut(outcome, run, file, written)
        file.write_bytes(content)
    return outcome


def sizes_to_cut(file: Path, content: bytes) -> list[int]:
    """Every byte of what was appended last; of files that are put in place as a whole, some, and the very end."""
    if file.suffix == ".jsonl":
        last = content.rstrip(b"\n").rfind(b"\n") + 1
    elif file.suffix == ".arrow":
        last = len(content) - 3500
    else:
        last = len(content) - 10
    return sorted({*range(0, last, max(1, last // 60)), *range(max(0, last), len(content))})


def _check_cut(outcome: Outcome, run: Path, file: Path, written: int) -> None:
    """A cut file costs no more than itself: all other segments are there, and right."""
    outcome.rounds += 1
    try:
        reader = RunReader(run)
        steps = reader.steps
        taken, norms, _ = reader.values()
        reader.metrics()
        reader.finding_list()
        reader.rollup(10)
    except GradwatchError as error:
        # A run without its facts whose segments still tell them opens; only one without both may say so.
        outcome.unreadable += 1
        outcome.notes.append(f"{file.name} cut: {type(error).__name__}: {error}")
        return
    except Exception as error:  # noqa: BLE001 -- any other exception is what we look for
        outcome.raised += 1
        outcome.notes.append(f"{file.name} cut: {type(error).__name__}: {error}")
        return
    if not np.array_equal(norms, norms_of(taken)):
        outcome.wrong += 1
        outcome.notes.append(f"{file.name} cut: other values")
    if file.parent.name != "steps" and len(steps) != written:
        outcome.wrong += 1
        outcome.notes.append(f"{file.name} cut: {len(steps)} of {written} steps")


def write_steps(run: Path, count: int, *, seal_at: int, disk: Disk | None = None, finish: bool = False) -> int:
    """Record steps 0 to `count` without threads, sealed at multiples of `seal_at`, the rest open; returns `count`."""
    target = store.Store(run, RunInfo(PARAMETERS), disk=disk)
    try:
        for step in range(0, count, 10):
            for each in range(step, min(step + 10, count)):
                target.append(row_of(each))
            if (step + 10) % seal_at == 0:
                target.end_segment()
                target.seal()
        if finish:
            target.finish("finished")
    finally:
        target.release()
    return count


# -- faults of the disk ------------------------------------------------------------------------------------------------


class FailingDisk(Disk):
    """Raises OSError for a while, after a part of the data has been written."""

    #: The error, and at which operations it comes.
    code = errno.ENOSPC
    failing: range = range(0)
    count = 0

    def _operation(self) -> None:
        type(self).count += 1
        if self.count in self.failing:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path) -> io.FileIO:
        self._operation()
        return super().open(path)

    def append(self, file: int, data: bytes) -> None:
        super().append(file, data[: len(data) // 2])
        self._operation()
        super().append(file, data[len(data) // 2 :])

    def truncate(self, file: int, size: int) -> None:
        self._operation()
        super().truncate(file, size)

    def sync(self, file: int) -> None:
        self._operation()
        super().sync(file)

    def replace(self, path: Path, data: Any) -> None:
        self._operation()
        super().replace(path, data)

    def remove(self, path: Path) -> None:
        self._operation()
        super().remove(path)


def fault_campaign(rounds: int, folder: Path, *, seed: int = 0) -> Outcome:
    """A disk that fails for some operations, with ENOSPC, EIO or EROFS; then it works again, or not."""
    outcome = Outcome("faults of the disk: ENOSPC, EIO, EROFS")
    draw = random.Random(seed)  # noqa: S311 -- no secrets
    kept = trouble.FIRST_RETRY, trouble.LAST_RETRY, store.SEAL_ROWS, recorder.SYNC
    trouble.FIRST_RETRY, trouble.LAST_RETRY, store.SEAL_ROWS, recorder.SYNC = 0.01, 0.02, 40, 0.02
    try:
        for number in range(rounds):
            first = draw.randrange(8, 60)
            lasting = draw.random() < 0.25
            failing = range(first, 1 << 60 if lasting else first + draw.randrange(1, 12))
            members = {"failing": failing, "code": draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS]), "count": 0}
            _survive(outcome, folder / f"run-{number}", type("ThisDisk", (FailingDisk,), members), lasting=lasting)
    finally:
        trouble.FIRST_RETRY, trouble.LAST_RETRY, store.SEAL_ROWS, recorder.SYNC = kept
    return outcome


def _survive(outcome: Outcome, run: Path, disk: type[Disk], *, lasting: bool) -> None:
    """Record 300 steps on a disk that fails; when it recovers, every one of them must be there."""

    class ThisWriter(RunWriter):
        disk_type = disk

    writer = ThisWriter(run, RunInfo(PARAMETERS), flush_every=10, flush_seconds=0.01)
    for step in range(300):
        try:
            writer.write(row_of(step))
            if step % 25 == 0:
                writer.event("finding", Finding(f"spike-{step}", "spike", "critical", step, step).to_json(), sync=True)
        except Exception as error:  # noqa: BLE001 -- counted: none may reach the training loop
            outcome.raised += 1
            outcome.notes.append(f"write: {error!r}")
        if step % 10 == 0:
            time.sleep(0.002)
    try:
        if not lasting:
            time.sleep(0.3)
        writer.close()
    except Exception as error:  # noqa: BLE001
        outcome.raised += 1
        outcome.notes.append(f"close: {error!r}")
    found = outcome.check(run)
    if not lasting and found != 300:
        outcome.wrong += 1
        outcome.notes.append(f"round {outcome.rounds}: {found} of 300 steps after the disk recovered")
    if found + writer.dropped_steps != 300:
        outcome.wrong += 1
        outcome.notes.append(f"round {outcome.rounds}: {found} recorded, {writer.dropped_steps} counted as dropped")


# -- power cuts --------------------------------------------------------------------------------------------------------


class VolatileDisk(Disk):
    """Remembers what would survive a power cut: content that was synced, under names whose folder was synced.

    Of what was not synced any part may survive; `cut` draws it.
    """

    def __init__(self) -> None:
        self.safe: dict[Path, bytes] = {}
        self.names: set[Path] = set()

    def sync(self, file: int) -> None:
        super().sync(file)
        path = Path(f"/proc/self/fd/{file}").readlink()
        self.safe[path] = path.read_bytes()

    def sync_folder(self, path: Path) -> None:
        self.names = {name for name in self.names if name.parent != path} | {
            name for name in path.iterdir() if name.is_file()
        }

    def replace(self, path: Path, data: Any) -> None:
        super().replace(path, data)
        self.safe[path] = bytes(data)

    def cut(self, run: Path, target: Path, draw: random.Random) -> None:
        """Write to `target` what the run at `run` may look like after a power cut at this moment."""
        for path in {*self.names, *(p for p in run.rglob("*") if p.is_file())}:
            now = path.read_bytes() if path.exists() else None
            synced = self.safe.get(path) if path in self.names else None
            content = draw.choice([synced, now]) if now is None or synced is None else _partly(synced, now, draw)
            if content is not None:
                place = target / path.relative_to(run)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)


def _partly(synced: bytes, now: bytes, draw: random.Random) -> bytes:
    """What was synced, and of what was appended since: nothing, a part, or a part that is all zeros."""
    if not now.startswith(synced):
        return draw.choice([synced, now])
    more = now[len(synced) : draw.randint(len(synced), len(now))]
    return synced + draw.choice([more, bytes(len(more))])


def power_campaign(rounds: int, folder: Path, *, seed: int = 0) -> Outcome:
    """Cut the power at moments all over the life of a run; what was synced must be there, and right."""
    outcome = Outcome("power cuts: any part of what was not synced is gone")
    draw = random.Random(seed)  # noqa: S311 -- no secrets
    for number in range(rounds):
        run, left = folder / f"run-{number}", folder / f"left-{number}"
        disk = VolatileDisk()
        target = store.Store(run, RunInfo(PARAMETERS), disk=disk)
        synced = step = 0
        until = draw.randrange(1, 400)
        while step < until:
            target.append(row_of(step))
            step += 1
            if draw.random() < 0.1:
                target.sync()
                synced = step
            if draw.random() < 0.02:
                target.end_segment()
                if draw.random() < 0.7:
                    target.seal()
                    synced = step
        disk.cut(run, left, draw)
        target.release()
        outcome.check(left, handed=step, known=synced, gaps=True)
        shutil.rmtree(run)
        shutil.rmtree(left)
    return outcome


# -- all ---------------------------------------------------------------------------------------------------------------


def in_a_folder(campaign: Callable[..., Outcome], *args: Any, **settings: Any) -> Outcome:
    """Run a campaign in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return campaign(*args, folder=Path(folder), **settings)


def main() -> int:
    """Run all campaigns, print and write the table; 1 when anything but a tail was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--cuts", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/crash.json"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    outcomes = [
        in_a_folder(kill_campaign, options.kills * 3 // 5),
        in_a_folder(kill_campaign, options.kills - options.kills * 3 // 5, at_operations=True),
        in_a_folder(truncation_campaign),
        in_a_folder(fault_campaign, options.faults),
        in_a_folder(power_campaign, options.cuts),
    ]
    print(f"{'campaign':55} {'rounds':>6} {'unread':>6} {'wrong':>6} {'lost':>6} {'tail':>6} {'raised':>6}")
    for o in outcomes:
        numbers = (o.rounds, o.unreadable, o.wrong, o.lost_recorded, o.longest_tail, o.raised)
        print(f"{o.campaign:55}", *(f"{number:>6}" for number in numbers))
        print(*o.notes[:5], sep="\n", end="\n" if o.notes else "")
    options.out.write_text(json.dumps({**machine(), "campaigns": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    return 0 if all(o.is_clean for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
