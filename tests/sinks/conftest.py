import tempfile
from typing import Any

import pytest

from tests.extras import CHOSEN


@pytest.fixture(autouse=True, scope="package")
def wandbs_own_threads() -> None:
    """W&B keeps threads for the life of the process; they start here, before the tests."""
    if "wandb" in CHOSEN["needs"]:
        import wandb

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_SILENT", "true")
            run: Any = wandb.init(mode="offline", dir=tempfile.mkdtemp(), project="test")
            run.config.update({"a": 1})
            run.log({"a": 1})
            run.finish()
