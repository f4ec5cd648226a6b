"""Closures of optimizer steps: the arguments with one that tells when it has been evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradwatch.errors import StopTraining

Closure = Callable[[], Any]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of `Optimizer.step`, the optimizer itself being the first."""
    found: Closure | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return found


def telling(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    evaluated: Callable[[], None],
    failed: Callable[[Exception], None],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a closure that calls `evaluated` behind each evaluation; `failed` takes what that raises."""
    closure = closure_of(args, kwargs)

    def evaluate() -> Any:
        result = closure() if closure is not None else None
        try:
            evaluated()
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the step
            failed(error)
        return result

    return ((args[0], evaluate, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluate})
