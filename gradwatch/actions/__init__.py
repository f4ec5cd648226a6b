"""Remedies: they decide, the backend applies."""

from gradwatch.actions.adaptive import AutoClip, ZClip
from gradwatch.actions.agc import AGC
from gradwatch.actions.base import Action, BetweenStepsAction, Due, InStepAction, InStepDecision, Namespace, RunState
from gradwatch.actions.clip import Clip
from gradwatch.actions.lr import DecayLR
from gradwatch.actions.presets import Ladder, protect, repair
from gradwatch.actions.raise_lr import RaiseLR
from gradwatch.actions.renewal import Reinitialize, ResetOptimizerState, Restructure, Stop
from gradwatch.actions.rollback import Rollback
from gradwatch.actions.skip import SkipStep

__all__ = [
    "AGC",
    "Action",
    "AutoClip",
    "BetweenStepsAction",
    "Clip",
    "DecayLR",
    "Due",
    "InStepAction",
    "InStepDecision",
    "Ladder",
    "Namespace",
    "RaiseLR",
    "Reinitialize",
    "ResetOptimizerState",
    "Restructure",
    "Rollback",
    "RunState",
    "SkipStep",
    "Stop",
    "ZClip",
    "protect",
    "repair",
]
