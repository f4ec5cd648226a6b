"""A training process that is killed loses at most the unflushed tail of its record."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradwatch.run import load

pytestmark = pytest.mark.framework("torch")

FLUSH_EVERY = 20
TRAINING = """
import os, sys, time, torch, gradwatch as gw
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
watcher = gw.watch(model, optimizer, run_dir=sys.argv[1], flush_every=int(sys.argv[2]))
x, y = torch.randn(32, 8), torch.randn(32, 1)
for step in range(10**9):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    watcher.log(loss=loss)
    os.write(1, step.to_bytes(8, "little"))
    time.sleep(0.003)  # of a model that is worth watching
"""


def killed_after(run_dir: Path, steps: int) -> int:
    """Train in a process of its own, kill it after so many steps; the last step it had told of."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(run_dir), str(FLUSH_EVERY)],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        told = process.stdout.read(8 * steps)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
        assert process.wait() == -signal.SIGKILL
    return int.from_bytes(told[len(told) // 8 * 8 - 8 : len(told) // 8 * 8], "little")


@pytest.mark.parametrize("kill", range(10))
def test_a_killed_run_opens_holds_all_but_the_tail_and_reports(tmp_path: Path, kill: int) -> None:
    run_dir = tmp_path / "run"
    last = killed_after(run_dir, steps=5 + 61 * kill)

    run = load(run_dir)

    assert run.info.status == "crashed"
    np.testing.assert_array_equal(run.steps, np.arange(len(run.steps)))
    # A row is closed by the step after it, and the writer's thread is given the time of one flush more.
    assert len(run.steps) >= last - 2 * FLUSH_EVERY
    assert np.isfinite(run.grad_norms().to_numpy()).all()
    run.report(tmp_path / "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text()
