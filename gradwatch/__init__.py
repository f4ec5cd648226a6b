"""Flight recorder and autopilot of a training run.

`watch` records the gradient norms of every layer at every step, finds vanishing and exploding gradients and applies the
chosen remedies; `load` opens the record. Names are loaded on first use, so that `import gradwatch` imports no framework
and nothing else that is large.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch import errors as errors
    from gradwatch.errors import GradwatchError as GradwatchError
    from gradwatch.errors import StopTraining as StopTraining
    from gradwatch.records import Parameter as Parameter

__version__ = "0.1.0.dev0"
__all__ = [
    "GradwatchError",
    "Parameter",
    "StopTraining",
    "errors",
]

#: Public class or function to the module that holds it.
_HOMES = {
    "GradwatchError": "gradwatch.errors",
    "Parameter": "gradwatch.records",
    "StopTraining": "gradwatch.errors",
}
#: Public module to the module it is.
_MODULES = {
    "errors": "gradwatch.errors",
}


def __getattr__(name: str) -> Any:
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
