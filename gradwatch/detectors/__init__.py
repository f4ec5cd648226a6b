"""Detectors: record in, findings out."""

from gradwatch.detectors.base import Detector, RunContext
from gradwatch.detectors.engine import Engine, replay

__all__ = ["Detector", "Engine", "RunContext", "replay"]
