"""What is wrong with a watched play in which a fault was injected, beside an unwatched play of the same scene."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import gradwatch as gw
from benchmarks.faultwork.play import MARK, Played
from benchmarks.faultwork.sites import Site

#: Longest hang of a thread, in seconds, where the loop does not end it first.
HANG = 0.4


class InjectedError(Exception):
    """An ordinary failure, of a class that no code can expect."""


def _raise(error: Callable[[], BaseException]) -> Callable[[threading.Event], None]:
    def strike(_: threading.Event) -> None:
        raise error()

    return strike


def _hang(released: threading.Event) -> None:
    released.wait(HANG)


#: What a fault does, by name. `twice`: the call fails, then one that gradwatch makes soon after.
KINDS: dict[str, Callable[[threading.Event], None]] = {
    "error": _raise(lambda: InjectedError(MARK)),
    "out of memory": _raise(lambda: MemoryError(MARK)),
    "OSError": _raise(lambda: OSError(errno.EIO, MARK)),
    "twice": _raise(lambda: InjectedError(MARK)),
    "interrupt": _raise(lambda: KeyboardInterrupt(MARK)),
    "hang": _hang,
}


def kinds_for(site: Site) -> list[str]:
    """What may happen there: interrupts come to the main thread only, and only other threads may hang."""
    if site.thread != "main":
        return ["error", "out of memory", "OSError", "hang"]
    return ["error", "out of memory", "OSError", "interrupt", *["twice"] * (site.when == "before")]


def verdict(played: Played, plain: list[str], run_dir: Path, site: Site, kind: str) -> list[str]:
    """All that is wrong; nothing where the law was kept."""
    wrong = [f"leak: {what}" for what in played.leaks]
    states = played.digests if played.error is None else played.digests[:-1]
    if states != plain[: len(states)]:
        step = next(k for k, state in enumerate(states) if state != plain[k]) - 1
        wrong.append(f"differs: from step {step}")
    if site.moment == "watch" and played.error is not None and played.digests[-1] != plain[0]:
        wrong.append("differs: `watch` failed and left other state than it found")
    if kind == "interrupt":
        if not isinstance(played.error, KeyboardInterrupt):
            wrong.append(f"swallowed: an interrupt, {played.error!r}")
    elif played.error is not None and site.moment != "watch":
        wrong.append(f"raised: {type(played.error).__name__}: {played.error}")
    if played.is_blocked:
        wrong.append("blocked: the loop waited for a thread that hung")
    if kind not in {"interrupt", "hang"} and played.error is None:
        wrong += _told(played, kind)
    if played.error is None or site.moment != "watch":
        wrong += _record(run_dir)
    return wrong


def _told(played: Played, kind: str) -> list[str]:
    told = [text for _, text in played.logged if MARK in text]
    # The second of two may be in the logging itself.
    wrong = [] if told or kind == "twice" else ["unlogged: nobody hears of the fault"]
    if len(told) > (1 if kind != "twice" else 2):
        wrong.append(f"noisy: logged {len(told)} times")
    if not any(played.failures.values()):
        wrong.append("uncounted: not among the failures of the run")
    return wrong


def _record(run_dir: Path) -> list[str]:
    try:
        run = gw.load(run_dir)
        run.grad_norms()
        run.findings()
    except Exception as error:  # noqa: BLE001 -- any exception is what we look for
        return [f"unreadable: {type(error).__name__}: {error}"]
    return [] if run.info.status == "finished" else [f"unfinished: the record says {run.info.status}"]
