"""What is wrong with a watched play in which a fault was injected, beside an unwatched play of the same scene."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path

import gradwatch as gw
from benchmarks.faultwork.play import MARK, Loop, Played
from benchmarks.faultwork.sites import Site

#: How long a thread hangs at the end of a run, and how often so long while the loop runs, whose end is the hang's.
HANG, MOST_HANGS = 0.4, 50
#: Parts that may fail with every step in the record, every sink told of all steps.
_APART = ("Call", "Mirror", "detector", "log", "loss hook", "statistics", "activations", "graph", "actions")


class InjectedError(Exception):
    """An ordinary failure, of a class that no code can expect."""


#: What a fault raises, by name; a hang raises nothing. `twice`: the call fails, then one out of our code soon after.
KINDS: dict[str, BaseException | None] = {
    "error": InjectedError(MARK),
    "out of memory": MemoryError(MARK),
    "OSError": OSError(errno.EIO, MARK),
    "twice": InjectedError(MARK),
    "interrupt": KeyboardInterrupt(MARK),
    "hang": None,
}


def strike(kind: str, loop: Loop) -> None:
    """Let the call fail."""
    error = KINDS[kind]
    if error is not None:
        raise type(error)(*error.args)
    if loop.over.is_set():
        time.sleep(HANG)
    elif not any(loop.over.wait(HANG) for _ in range(MOST_HANGS)):
        loop.was_blocked = True


def kinds_for(site: Site) -> list[str]:
    """What may happen there: interrupts come to the main thread only, and only other threads may hang."""
    if site.thread != "main":
        return ["error", "out of memory", "OSError"] * (not site.leads) + ["hang"] * (
            site.waits and site.when == "before"
        )
    if site.leads:
        return ["interrupt"]
    return ["error", "out of memory", "OSError", "interrupt", *["twice"] * (site.when == "before")]


@dataclass
class Fault:
    """What was injected.

    Args:
        site: Where.
        kind: Of `KINDS`.
        is_foreseen: Whether the code names this error where it calls; then nobody need be told.
    """

    site: Site
    kind: str
    is_foreseen: bool = False


def verdict(played: Played, clean: Played, plain: list[str], run_dir: Path, fault: Fault) -> list[str]:
    """All that is wrong; nothing where the law was kept.

    Args:
        played: With the fault.
        clean: Watched, without a fault.
        plain: States without a watcher.
        run_dir: The record.
        fault: What was injected.
    """
    wrong = harm(played, plain, fault)
    if played.has_begun:
        wrong += _record(run_dir, played, fault)
    return wrong + (_rest(played, clean) if played.error is None and fault.kind != "interrupt" else [])


def harm(played: Played, plain: list[str], fault: Fault) -> list[str]:
    """What is wrong with the training, and with what was told of the fault."""
    site, kind = fault.site, fault.kind
    wrong = [f"leak: {what}" for what in played.leaks]
    states = played.digests if played.error is None else played.digests[:-1]
    if states != plain[: len(states)]:
        step = next(k for k, state in enumerate(states) if state != plain[k]) - 1
        wrong.append(f"differs: from step {step}")
    if not played.has_begun and played.digests[-1] != plain[0]:
        wrong.append("differs: `watch` failed and left other state than it found")
    if kind == "interrupt":
        # At the end of the interpreter nobody is left to take it.
        if site.moment != "exit" and not isinstance(played.error, KeyboardInterrupt):
            wrong.append(f"swallowed: an interrupt, {played.error!r}")
    elif played.error is not None and played.has_begun:
        wrong.append(f"raised: {type(played.error).__name__}: {played.error}")
    if played.is_blocked:
        wrong.append("blocked: the loop waited for a thread that hung")
    if kind not in {"interrupt", "hang"} and played.error is None:
        wrong += _told(played, fault)
    return wrong


def _told(played: Played, fault: Fault) -> list[str]:
    told = [text for _, text in played.logged if MARK in text]
    # What is heard of the fault may be what became of it. The second of two may be in the logging itself.
    is_heard = bool(played.logged) or fault.is_foreseen or fault.kind == "twice"
    wrong = [] if is_heard else ["unlogged: nobody hears of the fault"]
    if len(told) > (1 if fault.kind != "twice" else 2):
        wrong.append(f"noisy: logged {len(told)} times")
    if not any(played.failures.values()) and not fault.is_foreseen:
        wrong.append("uncounted: not among the failures of the run")
    return wrong


def _record(run_dir: Path, played: Played, fault: Fault) -> list[str]:
    try:
        run = gw.load(run_dir)
        played.steps = len(run.grad_norms())
        run.findings()
    except Exception as error:  # noqa: BLE001 -- any exception is what we look for
        return [f"unreadable: {type(error).__name__}: {error}"]
    # What is interrupted may say so.
    has_ended = run.info.status == "finished" or (fault.kind == "interrupt" and run.info.status == "crashed")
    return [] if has_ended else [f"unfinished: the record says {run.info.status}"]


def _rest(played: Played, clean: Played) -> list[str]:
    """What no longer works although it was another part that failed; alike ones are two, of which one may fail."""
    failed = {part for part, count in played.failures.items() if count}
    if not all(part.startswith((*_APART, "RunWriter thread")) for part in failed):
        return []
    wrong = []
    if played.steps + played.dropped < clean.steps:
        wrong.append(f"lost: {clean.steps - played.steps - played.dropped} steps are not in the record")
    sinks = [played.heard[name].steps == heard.steps for name, heard in clean.heard.items() if "sink" in name]
    if not _suffice(sinks, "Mirror", failed):
        wrong.append("deaf: a sink did not hear of all steps")
    alerts = ["own" in played.heard[name].rules for name in clean.heard if "alert" in name]
    if not any(part.startswith("detector") for part in failed) and not _suffice(alerts, "Call", failed):
        wrong.append("deaf: an alert did not hear of a finding")
    return wrong


def _suffice(well: list[bool], part: str, failed: set[str]) -> bool:
    return sum(well) >= len(well) - sum(each.startswith(part) for each in failed)
