"""What a notebook shows, in a real kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = (
    "import time, numpy as np, gradwatch as gw",
    """watcher = gw.Watcher([gw.Parameter("fc.weight")], run_dir="run", flush_every=1)
with gw.load("run").live(every=0.05):
    for step in range(3):
        watcher.observe(grad_norm=np.ones(1), loss=0.5)
    watcher.close()
    time.sleep(0.5)""",
    "gw.load('run')",
)


def test_a_live_view_is_renewed_in_place_while_the_cell_runs(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()

    [shown] = notebook.cells[1].outputs
    [run] = notebook.cells[2].outputs
    assert "3 steps without a finding" in shown["data"]["text/html"]
    assert shown["data"]["text/html"] == run["data"]["text/html"]
