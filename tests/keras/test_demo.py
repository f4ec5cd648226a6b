"""`gradwatch demo --framework keras`, with fewer digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress

import gradwatch as gw
from gradwatch import demo
from gradwatch.demo_keras import run_demo
from tests.keras.training import BACKEND


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend shows the three acts; the others only take longer")
def test_the_demo_tells_a_sick_training_from_a_healthy_and_a_helped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = demo.digits()
    monkeypatch.setattr(demo, "digits", lambda: (images[::5], labels[::5]))
    monkeypatch.setattr(demo, "TRAINED", 640)
    with Progress(disable=True) as progress:
        outcomes = run_demo(tmp_path, progress=progress)
    healthy, sick, helped = (gw.load(outcome.run_dir) for outcome in outcomes)
    assert len(healthy.grad_norms()) == 50
    assert healthy.findings().empty
    assert "critical" in set(sick.findings()["severity"])
    assert helped.metrics()["loss"].iloc[-10:].mean() < 2.0
    assert outcomes[0].accuracy > outcomes[1].accuracy
