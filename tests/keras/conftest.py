"""The Keras tests run once per backend, each in its own process: `KERAS_BACKEND=jax pytest tests/keras`."""

from __future__ import annotations

import functools
import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two devices on one CPU, for the tests of distributed training.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

BACKEND = os.environ.get("KERAS_BACKEND", "")

#: Warnings that Keras and PyTorch raise about themselves.
OF_OTHERS = (
    "ignore:__array__ implementation:DeprecationWarning",  # Keras, with a numpy newer than it was written for
    "ignore:`torch.jit.script:DeprecationWarning",  # torch.compile, on its first use
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
)

if BACKEND == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

if not BACKEND:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    return f"Keras backend under test: {BACKEND or 'none (set KERAS_BACKEND)'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for text in OF_OTHERS:
            item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True)
def _cheap_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile captures and guards is under test; only slow tests wait for its C++ compiler as well."""
    if BACKEND == "torch" and request.node.get_closest_marker("slow") is None:
        import torch

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    import keras

    keras.utils.set_random_seed(1)
