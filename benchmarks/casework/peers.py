"""What other rules score on such cases: re-implemented from their sources, train metrics only, step by step.

Measured on a larger set of the same kind (79 healthy runs of 118,375 steps; 156 failed runs: 33 delayed blow-ups, 49 at
once, 74 stuck), so compare sizes, not decimals. Any alarm counts, whatever it is called.
"""

from __future__ import annotations

from dataclasses import dataclass

NAN = float("nan")


@dataclass(frozen=True)
class Peer:
    """One row: the measures of `scoring.MEASURES` that are known of a peer."""

    name: str
    recall: float
    healthy_alarmed: float
    precision: float
    episodes: float
    warned: float
    lead: float
    stuck_step: float


PEERS = (
    Peer("SageMaker Debugger: vanishing, < 1e-7", 0.40, 0.10, 0.89, 0.9, 0 / 33, NAN, 0),
    Peer("SageMaker Debugger: NaN or Inf", 0.33, 0.00, 1.00, 0.0, 0 / 33, NAN, NAN),
    Peer("update/weight ratio in [1e-5, 1e-1]", 0.72, 0.27, 0.84, 2.9, 31 / 33, 22, 1),
    Peer("AUTOTRAINER, gradient rules", 0.67, 0.29, 0.82, 9.3, 3 / 33, 15, 0),
    Peer("AUTOTRAINER, with accuracy gate", 0.83, 0.10, 0.94, 1.6, 6 / 33, 31, 202),
    Peer("DeepDiagnosis, gradients and NaN", 0.72, 0.08, 0.95, 5.2, 0 / 33, NAN, 5),
    Peer("TheDeepChecker, gradients", 0.54, 0.10, 0.91, 0.7, 0 / 33, NAN, 9),
    Peer("TheDeepChecker, with update ratio", 0.75, 0.51, 0.75, 7.9, 27 / 33, 15, 9),
    Peer("ZClip (z 2.5) as a detector", 0.72, 0.87, 0.62, 32, 19 / 33, 23, 101),
    Peer("OLMo, 6 sigma", 0.59, 0.62, 0.65, 9.5, 11 / 33, 12, 689),
    Peer("Megatron, 10 x", 0.51, 0.27, 0.79, 6.0, 1 / 33, 1, NAN),
)
