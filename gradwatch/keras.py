"""Keras 3, any backend: `model.fit(..., callbacks=[gradwatch.keras.GradWatch(run_dir="runs/keras")])`."""

from __future__ import annotations

from gradwatch.integrations.keras import GradWatch

__all__ = ["GradWatch"]
