"""What stands before the tests of alerts."""

from __future__ import annotations

import warnings

import pytest

from tests.extras import CHOSEN


@pytest.fixture(autouse=True, scope="session")
def apprises_own_pool() -> None:
    """Apprise keeps one pool of threads for the life of the process; it starts here, before the tests."""
    if "alerts" in CHOSEN["needs"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from apprise.apprise import get_shared_executor

        get_shared_executor().submit(int).result()
