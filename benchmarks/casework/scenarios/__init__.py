"""Our own scenarios: small real PyTorch trainings, faulty and healthy, seconds each."""

from __future__ import annotations

from benchmarks.casework.scenarios import (
    faulty_bugs,
    faulty_numbers,
    faulty_rates,
    faulty_signal,
    healthy_networks,
    healthy_traps,
)
from benchmarks.casework.scenarios.base import SCENARIOS

__all__ = [
    "SCENARIOS",
    "faulty_bugs",
    "faulty_numbers",
    "faulty_rates",
    "faulty_signal",
    "healthy_networks",
    "healthy_traps",
]
