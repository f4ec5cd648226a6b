"""Remedies: they decide, the backend applies."""

from gradwatch.actions.base import Action, BetweenStepsAction, InStepAction
from gradwatch.actions.clip import Clip
from gradwatch.actions.lr import DecayLR
from gradwatch.actions.skip import SkipStep

__all__ = ["Action", "BetweenStepsAction", "Clip", "DecayLR", "InStepAction", "SkipStep"]
