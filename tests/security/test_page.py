"""The page on threats names tests that are there."""

from __future__ import annotations

import re

from tests import sizes


def test_every_test_that_the_threat_model_names_is_there() -> None:
    page = (sizes.ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)

    assert named
    assert [name for file, name in named if f"def {name}(" not in (sizes.ROOT / file).read_text("utf-8")] == []
