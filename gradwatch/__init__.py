"""Flight recorder and autopilot of a training run.

`watch` records the gradient norms of every layer at every step, finds vanishing and exploding gradients and applies the
chosen remedies; `load` opens the record. Names are loaded on first use, so that `import gradwatch` imports no framework
and nothing else that is large.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # what type checkers take for True; importing typing would be most of our own time
if TYPE_CHECKING:
    from gradwatch import actions as actions
    from gradwatch import alerts as alerts
    from gradwatch import detectors as detectors
    from gradwatch import errors as errors
    from gradwatch import keras as keras
    from gradwatch import remedies as remedies
    from gradwatch import sinks as sinks
    from gradwatch import testing as testing
    from gradwatch.actions import AGC as AGC
    from gradwatch.actions import AutoClip as AutoClip
    from gradwatch.actions import Clip as Clip
    from gradwatch.actions import DecayLR as DecayLR
    from gradwatch.actions import Ladder as Ladder
    from gradwatch.actions import RaiseLR as RaiseLR
    from gradwatch.actions import Reinitialize as Reinitialize
    from gradwatch.actions import ResetOptimizerState as ResetOptimizerState
    from gradwatch.actions import Restructure as Restructure
    from gradwatch.actions import Rollback as Rollback
    from gradwatch.actions import SkipStep as SkipStep
    from gradwatch.actions import Stop as Stop
    from gradwatch.actions import ZClip as ZClip
    from gradwatch.errors import GradwatchError as GradwatchError
    from gradwatch.errors import StopTraining as StopTraining
    from gradwatch.heal import heal as heal
    from gradwatch.preflight import preflight as preflight
    from gradwatch.records import Parameter as Parameter
    from gradwatch.run import Run as Run
    from gradwatch.run import compare as compare
    from gradwatch.run import load as load
    from gradwatch.watch import watch as watch
    from gradwatch.watcher import Watcher as Watcher

__version__ = "0.1.0.dev0"
__all__ = [
    "AGC",
    "AutoClip",
    "Clip",
    "DecayLR",
    "GradwatchError",
    "Ladder",
    "Parameter",
    "RaiseLR",
    "Reinitialize",
    "ResetOptimizerState",
    "Restructure",
    "Rollback",
    "Run",
    "SkipStep",
    "Stop",
    "StopTraining",
    "Watcher",
    "ZClip",
    "actions",
    "alerts",
    "compare",
    "detectors",
    "errors",
    "heal",
    "keras",
    "load",
    "preflight",
    "remedies",
    "sinks",
    "testing",
    "watch",
]

#: Public class or function to the module that holds it.
_HOMES = {
    "AGC": "gradwatch.actions",
    "AutoClip": "gradwatch.actions",
    "Clip": "gradwatch.actions",
    "DecayLR": "gradwatch.actions",
    "GradwatchError": "gradwatch.errors",
    "Ladder": "gradwatch.actions",
    "Parameter": "gradwatch.records",
    "RaiseLR": "gradwatch.actions",
    "Reinitialize": "gradwatch.actions",
    "ResetOptimizerState": "gradwatch.actions",
    "Restructure": "gradwatch.actions",
    "Rollback": "gradwatch.actions",
    "Run": "gradwatch.run",
    "SkipStep": "gradwatch.actions",
    "Stop": "gradwatch.actions",
    "StopTraining": "gradwatch.errors",
    "Watcher": "gradwatch.watcher",
    "ZClip": "gradwatch.actions",
    "compare": "gradwatch.run",
    "heal": "gradwatch.heal",
    "load": "gradwatch.run",
    "preflight": "gradwatch.preflight",
    "watch": "gradwatch.watch",
}
#: Public module to the module it is.
_MODULES = {
    "actions": "gradwatch.actions",
    "alerts": "gradwatch.alerts",
    "detectors": "gradwatch.detectors",
    "errors": "gradwatch.errors",
    "keras": "gradwatch.keras",
    "remedies": "gradwatch.remedies",
    "sinks": "gradwatch.sinks",
    "testing": "gradwatch.testing",
}


if not TYPE_CHECKING:  # else a type checker would believe that every name is there

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        elif name in _MODULES:
            value = importlib.import_module(_MODULES[name])
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each submodule in its package; a public function of the same name must survive that.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
