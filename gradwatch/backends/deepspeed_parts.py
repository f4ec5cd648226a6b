"""What a rank holds of the parameters and gradients of a DeepSpeed engine, ZeRO stage 0 to 3."""

from __future__ import annotations

from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from gradwatch.backends.torch_sharding import wrappers_of


def engine_of(model: nn.Module) -> Any:
    """The engine of a model, which trainers do not hand to their callbacks; None where it has none."""
    return next(iter(wrappers_of(model, DeepSpeedEngine)), None)


def part(parameter: Any, *, is_first: bool) -> Tensor | None:
    """This rank's part of a reduced gradient, between the last backward pass and the step; None where it has none.

    Args:
        parameter: Of the engine's module.
        is_first: Whether this is the first rank: at stage 0 all have the whole gradient, and one counts.
    """
    if hasattr(parameter, "ds_id"):  # stage 3
        own: Tensor | None = safe_get_local_grad(parameter)
        return own
    if not hasattr(parameter, "_hp_mapping"):  # stage 0
        whole: Tensor | None = parameter.grad if is_first else None
        return whole
    mapping = parameter._hp_mapping  # stages 1 and 2: as `safe_get_full_grad` does, which then makes it full
    if mapping is None:
        return None
    gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    return gradient.narrow(0, address.start, address.numel) if len(gradient) == parameter.numel() else gradient


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole: stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
