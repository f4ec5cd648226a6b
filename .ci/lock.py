"""Rewrite constraints.txt: every package that the make targets install, at the version pip picks today.

Run by `make lock`. The pin of torch stays, since which build of torch a machine gets is the machine's affair.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = (
    "torch,jax,lightning,transformers,ignite,skorch,fastai,optax,flax,"
    "wandb,mlflow,tensorboard,alerts,prometheus,remote,serve,demo,bench,dev,docs"
)
HEADER = "# Versions that the tests run with. Written by `make lock`; edit pyproject.toml instead.\n"


def main() -> None:
    """Resolve all extras with pip and write what it would install."""
    torch = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.MULTILINE)
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", report.name, f"{ROOT}[{EXTRAS}]", "tensorflow-cpu", "hatchling"]
        subprocess.run(command + ([torch.group()] if torch else []), check=True)  # noqa: S603 -- our own words only
        installed = json.loads(Path(report.name).read_bytes())["install"]
    versions = {item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0] for item in installed}
    versions.pop("gradwatch")
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items(), key=lambda item: item[0].lower())]
    CONSTRAINTS.write_text(HEADER + "".join(lines))
    print(f"{CONSTRAINTS.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
