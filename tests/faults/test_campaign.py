"""A short fault campaign: calls of gradwatch fail in real trainings; the long one is `benchmarks.faults`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from benchmarks.faultwork import judge
from benchmarks.faultwork.campaign import Injection, Stage, chosen
from benchmarks.faultwork.play import MARK, Played
from benchmarks.faultwork.sites import Site

#: Injections for each kind of fault: a play takes about a tenth of a second.
MOST = 4


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage(("amp", "pair"))
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def injections(stage: Stage) -> list[Injection]:
    sites = {name: stage.sites(name) for name in stage.plain}
    return list(itertools.islice(chosen(sites, 7), 3000))


@pytest.mark.parametrize("kind", judge.KINDS)
def test_a_fault_changes_nothing_in_the_training_and_leaves_nothing_behind(
    stage: Stage, injections: list[Injection], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    of_kind = [each for each in injections if each.kind == kind][:MOST]
    outcomes = [(str(each.site), stage.inject(each)) for each in of_kind]

    assert [(site, outcome["wrong"]) for site, outcome in outcomes if outcome["wrong"]] == []
    assert any(outcome["fired"] for _, outcome in outcomes)


def test_the_sites_cover_hooks_backend_detectors_writer_alerts_and_sinks(stage: Stage) -> None:
    files = {site.file for site in stage.sites("amp")}

    assert {
        "backends/torch_gradients.py", "integrations/torch.py", "detectors/engine.py", "writer.py", "storage/disk.py",
        "alerts/courier.py", "sinks/base.py", "monitor.py",
    } <= files  # fmt: skip


SITE = Site("faults.py", 1, "Faults.call", 1, 0, "before", "steady", "main")


@pytest.mark.parametrize(
    ("played", "kind", "word"),
    [
        (Played(digests=["a", "c"], failures={"x": 1}, logged=[(40, MARK)]), "error", "differs"),
        (Played(digests=["a", "b"], failures={"x": 1}), "error", "unlogged"),
        (Played(digests=["a", "b"], logged=[(40, MARK)]), "error", "uncounted"),
        (Played(digests=["a", "b"], failures={"x": 1}, logged=[(40, MARK)] * 2), "error", "noisy"),
        (Played(digests=["a", "b"], failures={"log": 1}, logged=[(40, MARK)], steps=1), "error", "lost"),
        (Played(digests=["a", "b"], leaks=["taps"]), "hang", "leak"),
        (Played(digests=["a", "b"], is_blocked=True), "hang", "blocked"),
        (Played(digests=["a", "b"], error=ValueError("x")), "error", "raised"),
        (Played(digests=["a", "b"]), "interrupt", "swallowed"),
    ],
)
def test_the_judge_sees_each_kind_of_harm(
    stage: Stage, played: Played, kind: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_record", lambda *_: [])
    clean = Played(digests=["a", "b"], steps=2)
    played.steps = played.steps or clean.steps
    wrong = judge.verdict(played, clean, ["a", "b"], stage.folder, judge.Fault(SITE, kind))

    assert [what.partition(":")[0] for what in wrong] == [word]
