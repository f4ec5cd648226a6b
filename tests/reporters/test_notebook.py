"""What a notebook shows, in a real kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CELLS = (
    "import time, numpy as np, gradwatch as gw",
    """watcher = gw.Watcher([gw.Parameter("fc.weight")], run_dir="run", flush_every=1)
with gw.load("run").live(every=0.05):
    for step in range(3):
        watcher.observe(grad_norm=np.ones(1), loss=0.5)
    watcher.close()""",
    "gw.load('run')",
)
#: In a process of its own: nbclient leaves a thread behind where an event loop runs already.
EXECUTE = """
import json, sys, nbformat
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(cell) for cell in json.loads(sys.argv[1])]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=60).execute()
print(json.dumps([[dict(output["data"]) for output in cell.outputs] for cell in notebook.cells]))
"""


def test_a_live_view_is_renewed_in_place_while_the_cell_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXECUTE, json.dumps(CELLS)]
    told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    _, [shown], [run] = json.loads(told)

    assert "3 steps without a finding" in shown["text/html"]
    assert shown["text/html"] == run["text/html"]
