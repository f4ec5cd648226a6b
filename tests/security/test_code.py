"""What no file of gradwatch does: run text as code, unpickle, start a shell, guess a name of a temporary file."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from gradwatch.records import Parameter
from gradwatch.watcher import Watcher
from tests import sizes

FILES = sorted(sizes.PACKAGE.rglob("*.py"))
#: Modules that run, unpickle or fetch what they are given, and those whose functions start a shell.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "codeop", "yaml", "requests",
    "xml", "telnetlib", "ftplib", "commands", "pty", "ctypes", "cffi",
}  # fmt: skip
#: Calls, as the last parts of their dotted name.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "torch.load", "pd.read_pickle",
    "getoutput", "getstatusoutput", "create_subprocess_shell", "os.chmod", "os.umask",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names_of_imports(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {(node.module or "").partition(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [f"imports {name}" for name in names_of_imports(node) & FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name for call in FORBIDDEN_CALLS if name == call or ("." in call and name.endswith(f".{call}"))]
            found += [f"{name}({k.arg}=True)" for k in node.keywords if k.arg in ("shell", "allow_pickle")]
    return found


def test_no_file_runs_text_unpickles_or_starts_a_shell() -> None:
    assert {file.name: found for file in FILES if (found := complaints(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval('1')", ["eval"]),
        ("model.eval()", []),
        ("re.compile('x')", []),
        ("import pickle", ["imports pickle"]),
        ("from yaml import load", ["imports yaml"]),
        ("np.load(f, allow_pickle=True)", ["np.load(allow_pickle=True)"]),
        ("subprocess.run('x', shell=True)", ["subprocess.run(shell=True)"]),
    ],
)
def test_the_look_for_it_finds_it(source: str, found: list[str]) -> None:
    assert complaints(source) == found


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_files_are_as_open_as_the_umask_says_and_never_executable(
    mask: int, file_mode: int, folder_mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with Watcher([Parameter("fc.weight")], run_dir=tmp_path / "deep" / "run") as watcher:
            watcher.observe(grad_norm=np.ones(1))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep").rglob("*")}

    assert {mode for path, mode in modes.items() if path.is_file()} == {file_mode}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folder_mode}


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.framework("torch")
def test_snapshots_on_disk_are_for_their_owner_alone_and_go(tmp_path: Path) -> None:
    import torch

    from gradwatch.backends.torch_snapshots import Snapshots

    model = torch.nn.Linear(2, 2)
    snapshots = Snapshots(model, [torch.optim.SGD(model.parameters(), 0.1)], keep=1, directory=tmp_path)
    snapshots.take(0)
    [folder] = tmp_path.iterdir()

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    snapshots.close()
    assert list(tmp_path.iterdir()) == []
