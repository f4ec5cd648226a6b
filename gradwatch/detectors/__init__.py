"""Detectors: record in, findings out."""

from gradwatch.detectors.base import Detector, RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.engine import Engine, replay

__all__ = ["CATALOGUE", "Detector", "Engine", "RunContext", "replay"]
