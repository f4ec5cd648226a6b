"""The guard of tests/conftest.py sees what it should see, and nothing else."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests import conftest


def test_a_clean_process_has_no_wrapped_functions_and_no_global_hooks() -> None:
    assert conftest.wrapped_functions() == []
    assert conftest.global_hooks() == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.nn.utils.clip_grad, "clip_grad_value_"),
        (torch.amp.GradScaler, "step"),
        (torch.optim.Optimizer, "zero_grad"),
    ],
)
def test_a_wrapped_function_is_seen_although_it_wears_the_name_of_the_original(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapper)
        found = conftest.wrapped_functions()

    assert [entry.rpartition(".")[2] for entry in found] == [name]


def test_a_global_optimizer_hook_is_seen() -> None:
    handle = register_optimizer_step_post_hook(lambda *_: None)
    found = conftest.global_hooks()
    handle.remove()

    assert found == ["global hook torch.optim.optimizer._global_optimizer_post_hooks"]


def test_an_open_file_of_the_run_is_seen(tmp_path: Path) -> None:
    with (tmp_path / "steps").open("w"):
        found = conftest._open_files(tmp_path)

    assert found == [str(tmp_path / "steps")]


def test_a_running_thread_is_seen() -> None:
    before = set(threading.enumerate())
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    found = conftest._new_threads(before)
    release.set()
    thread.join()

    assert found == [thread]
