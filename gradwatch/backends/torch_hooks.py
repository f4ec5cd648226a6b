"""Handles of hooks that exist before their hooks do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class Handle:
    """Takes a hook away again, also where an error or an interrupt came before torch's own handle was kept.

    Args:
        owner: What carries the hook: a module, a parameter, an optimizer, or torch's module of optimizers.
        kind: The attribute in which it keeps such hooks.
        hook: The hook, which is kept alive by its owner alone.
    """

    def __init__(self, owner: Any, kind: str, hook: Any) -> None:
        self._owner, self._kind, self._hook = weakref.ref(owner), kind, weakref.ref(hook)

    def remove(self) -> None:
        """Take it away; a second call does nothing."""
        ours, hooks = self._hook(), getattr(self._owner(), self._kind, None) or {}
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]


def put(handles: list[Handle], owner: Any, kind: str, register: Callable[[Any], object], hook: Any) -> None:
    """Put a hook on its owner with `register`, once its handle is among the handles."""
    handles += [Handle(owner, kind, hook)]
    register(hook)
