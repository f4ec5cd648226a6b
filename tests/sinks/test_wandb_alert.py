"""Alerts through `wandb.alert`, read back from the file of an offline run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.alerts import WandBAlert
from gradwatch.errors import ConfigurationError
from gradwatch.records import Parameter
from gradwatch.watcher import Watcher
from tests.sinks import wandb_file

pytestmark = pytest.mark.needs("wandb")


def test_a_run_that_explodes_is_an_error_alert_of_wandb_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run: Any = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    with Watcher([Parameter("fc.weight")], run_dir=tmp_path / "run", alerts=[WandBAlert()]) as watcher:
        for step in range(120):
            watcher.observe(grad_norm=np.array([1.5**step]), loss=1.5**step)
    run.finish()

    alerts = [record.alert for record in wandb_file.records(tmp_path) if record.WhichOneof("record_type") == "alert"]
    exploding = [alert for alert in alerts if "exploding" in alert.text]
    assert watcher.faults.counts == {}
    assert [alert.level for alert in exploding] == ["ERROR"]
    assert "fc" in exploding[0].text


def test_without_a_run_it_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"no W&B run is active: call wandb.init\(\) first"):
        WandBAlert()
