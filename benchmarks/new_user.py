"""A new user in an empty folder: the built wheel, the start pages as printed, the time to the first report.

    python -m benchmarks.new_user                                  # PyTorch; an environment of its own, from nothing
    python -m benchmarks.new_user --framework tensorflow --keep DIRECTORY
    python -m benchmarks.new_user --install "torch==2.13.0"        # a certain build of the framework

Builds wheel and sdist, checks both with twine, installs the wheel, and does what the pages say: saves the blocks that
have the name of a file, runs the commands (`pip install gradwatch` became the wheel), and the blocks without a name in
their order. Fails at the first that does not work. The first report is there when `gradwatch report` has ended for the
first time. Nothing of the checkout but the data of README's example is on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from tests.docs.blocks import Block, blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "torch": ("docs/start/pytorch.md", "README.md", "docs/start/other.md", "docs/zh/index.md", "README.zh-CN.md"),
    "tensorflow": ("docs/start/keras.md", "docs/start/other.md"),
}
#: What the setup of README's example imports.
EXAMPLE = Path("tests/docs/training.py")


def built(folder: Path) -> Path:
    """The wheel, built from the sdist as an installer would, and checked."""
    say("building")
    python = environment(folder / "tools", "build", "twine")
    run([python, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)])
    run([python, "-m", "twine", "check", "--strict", *map(str, (folder / "dist").iterdir())])
    return next((folder / "dist").glob("*.whl"))


def environment(folder: Path, *packages: str) -> str:
    """The Python of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", *packages])
    return python


def run(command: list[str], **options: Any) -> None:
    """Run a command; what it prints is shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # noqa: S603 -- our own words
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def say(words: str) -> None:
    print(words, flush=True)


def follow(page: str, folder: Path, variables: dict[str, str]) -> float | None:
    """Do what a page says; returns the seconds until its first report was there."""
    folder.mkdir()
    (folder / EXAMPLE).parent.mkdir(parents=True)
    (folder / EXAMPLE).write_text((ROOT / EXAMPLE).read_text(encoding="utf-8"), encoding="utf-8")
    began, first = time.perf_counter(), None
    found = blocks(ROOT / page)
    commands = "\n".join(block.code for block in found if block.language == "sh")
    names = Path("blocks.py")
    for block in found:
        if block.title.endswith(".py"):
            (folder / block.title).write_text(block.code, encoding="utf-8")
            if f"python {block.title}" not in commands:
                run(["python", block.title], cwd=folder, env=variables)
        elif block.language == "python":
            with (folder / names).open("a", encoding="utf-8") as file:
                file.write(block.code)
        elif block.language == "sh":
            for line in lines(block):
                run(["bash", "-c", line], cwd=folder, env=variables)
                if "gradwatch report" in line and first is None:
                    first = time.perf_counter() - began
                    assert (folder / "report.html").stat().st_size > 10_000
        say(f"  {page}:{block.line} {block.title or block.language}")
    if (folder / names).exists():
        run(["python", str(names)], cwd=folder, env=variables)
    return first


def lines(block: Block) -> list[str]:
    """The commands of a block, but those that install or that belong to a checkout."""
    found = block.code.replace("\\\n", " ").splitlines()
    return [line for line in found if line.strip() and line.split()[0] not in ("pip", "make", "#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", choices=PAGES, default="torch")
    parser.add_argument("--install", default="", help="further requirements, such as a certain build of the framework")
    parser.add_argument("--keep", type=Path, help="where to work; it stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = (arguments.keep or Path(scratch)).resolve()
        wheel = built(place)
        say("installing")
        began = time.perf_counter()
        python = environment(place / "venv", f"{wheel}[{arguments.framework}]", *arguments.install.split())
        installed = time.perf_counter() - began
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
        variables["PATH"] = f"{Path(python).parent}{os.pathsep}{variables['PATH']}"
        report = {
            page: follow(page, place / page.removesuffix(".md").replace("/", "-"), variables)
            for page in PAGES[arguments.framework]
        }
    first = report[PAGES[arguments.framework][0]]
    assert first is not None
    say(f"installation {installed:.0f} s, from the installed wheel to the first report {first:.1f} s")
    result = {"machine": machine(), "installation_s": installed, "first_report_s": first, "pages": report}
    (ROOT / "benchmarks" / "results" / f"new_user-{arguments.framework}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
