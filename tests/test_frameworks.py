"""GRADWATCH_TEST_FRAMEWORKS chooses what is tested; what it names is tested or the run fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import conftest

HERE = Path(__file__).parent


def test_all_known_frameworks_are_tested_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADWATCH_TEST_FRAMEWORKS", raising=False)
    monkeypatch.setattr(conftest, "FRAMEWORKS", {"one": "numpy", "two": "pytest"})

    assert conftest._frameworks_under_test() == ("one", "two")


def test_an_unknown_framework_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_TEST_FRAMEWORKS", "troch")

    with pytest.raises(pytest.UsageError, match=r"unknown framework 'troch'\. Known: \['torch'"):
        conftest._frameworks_under_test()


def test_a_framework_that_is_not_installed_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conftest.FRAMEWORKS, "absent", "a_package_that_is_not_there")
    monkeypatch.setenv("GRADWATCH_TEST_FRAMEWORKS", "absent")

    with pytest.raises(pytest.UsageError, match="'absent' is not installed"):
        conftest._frameworks_under_test()


@pytest.mark.parametrize(("file", "left_out"), [("test_leaks.py", True), ("test_errors.py", None)])
def test_without_torch_the_files_that_import_it_are_left_out(
    monkeypatch: pytest.MonkeyPatch, file: str, left_out: bool | None
) -> None:
    monkeypatch.setenv("GRADWATCH_TEST_FRAMEWORKS", "none")
    monkeypatch.setattr(conftest, "CHOSEN", conftest._frameworks_under_test())

    assert conftest.pytest_ignore_collect(HERE / file) is left_out
