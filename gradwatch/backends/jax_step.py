"""What happens to the gradients inside a JAX step: measured, decided on, edited, by pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from gradwatch.actions.base import InStepAction
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, Parameter

Array = Any
#: What the actions of a run remember: a tuple of arrays for each.
States = tuple[tuple[Array, ...], ...]
_NONFINITE, _SPIKE = (SKIP_REASONS.index(reason) for reason in ("nonfinite", "spike"))


class Verdict(NamedTuple):
    """What the in-step actions want.

    Args:
        scale: Factor for all gradients (a scalar) or for each (shape (n,)).
        limit: Limit of each element.
        skip: Boolean scalar.
        reason: Index into SKIP_REASONS.
        coefficient: Factor on the global norm.
        states: What the actions remember.
    """

    scale: Array
    limit: float
    skip: Array
    reason: Array
    coefficient: Array
    states: States


def initial_states(actions: Sequence[InStepAction]) -> States:
    """What the actions remember before the first step."""
    return tuple(tuple(jnp.asarray(value, jnp.float32) for value in action.initial_state()) for action in actions)


def decide(actions: Sequence[InStepAction], norms: Array, states: States) -> Verdict:
    """The verdict over gradient norms.

    Args:
        actions: In the order in which they act, skips first.
        norms: Shape (n,), all measured.
        states: As from `initial_states`, or from the last verdict.
    """
    before = jnp.linalg.norm(norms)
    finite, skip = jnp.isfinite(before), jnp.array(False)
    used, scale, later = norms, jnp.float32(1.0), []
    for action, state in zip(actions, states, strict=True):
        decision = action.decide(used, state, jnp)
        news = [jnp.asarray(value, jnp.float32) for value in decision.state]
        later.append(tuple(jnp.where(skip, old, new) for old, new in zip(state, news, strict=True)))
        if decision.skip is not None:
            skip = skip | decision.skip
        if decision.scale is not None:
            # A factor from a norm that is not finite would carry the damage of one parameter to all.
            factor = jnp.where(jnp.isfinite(decision.scale) & finite, decision.scale, 1.0)
            scale, used = scale * factor, used * factor
    ratio = jnp.linalg.norm(used) / before
    return Verdict(
        scale=scale,
        limit=min((a.clip_value for a in actions if a.clip_value is not None), default=math.inf),
        skip=skip,
        reason=jnp.where(skip, jnp.where(finite, _SPIKE, _NONFINITE), 0),
        coefficient=jnp.where(jnp.isfinite(ratio) & ~skip, ratio, 1.0),
        states=tuple(later),
    )


def edited(gradients: Sequence[Array], verdict: Verdict) -> list[Array]:
    """The gradients, scaled and clipped as the actions want."""
    factors = jnp.broadcast_to(verdict.scale, (len(gradients),))
    scaled = [(g * factor).astype(g.dtype) for g, factor in zip(gradients, factors, strict=True)]
    return scaled if verdict.limit == math.inf else [jnp.clip(g, -verdict.limit, verdict.limit) for g in scaled]


def with_coefficient(verdict: Verdict, norms: Array, used: Sequence[Array]) -> Verdict:
    """The verdict, with what clipping by value amounts to: no norm foretells it.

    Args:
        verdict: Over the norms.
        norms: Shape (n,), before.
        used: The gradients as edited.
    """
    if verdict.limit == math.inf:
        return verdict
    ratio = jnp.linalg.norm(norms_of(used)) / jnp.linalg.norm(norms)
    return verdict._replace(coefficient=jnp.where(jnp.isfinite(ratio) & ~verdict.skip, ratio, 1.0))


def norms_of(arrays: Sequence[Array]) -> Array:
    """L2 norms, shape (n,), added in float32: infinite above 1.8e19."""
    if not arrays:
        return jnp.zeros(0, jnp.float32)
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(jnp.abs(a).astype(jnp.float32))) for a in arrays]))


def named(tree: Any) -> dict[str, Array]:
    """The floating-point leaves of a tree of parameters or gradients, by dotted name, such as `Dense_0.kernel`."""
    leaves = {".".join(path): leaf for path, leaf in _walk(tree) if _is_floating(leaf)}
    root = {name.partition(".")[0] for name in leaves}
    return {name.removeprefix("params."): leaf for name, leaf in leaves.items()} if root == {"params"} else leaves


def described(tree: Any) -> list[Parameter]:
    """The parameters of a tree. A layer's depth is its place in the order of definition, as far as the tree kept it."""
    depth: dict[str, int] = {}
    found = []
    for name, leaf in named(tree).items():
        layer = name.rpartition(".")[0] or name
        place = depth.setdefault(layer, len(depth))
        found.append(Parameter(name, shape=leaf.shape, layer=layer, depth=place, dtype=str(leaf.dtype)))
    return found


def _walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Array]]:
    if isinstance(tree, Mapping):
        for key in _in_order(list(tree)):
            yield from _walk(tree[key], (*path, str(key)))
        return
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Mapping)):
        below = path + tuple(word for key in keys if (word := _word(key)) != "value")
        yield from _walk(leaf, below) if isinstance(leaf, Mapping) else [(below, leaf)]


def _in_order(keys: list[Any]) -> list[Any]:
    """The order of definition; where JAX has sorted the keys, which it does by letters, by the numbers in them."""
    return sorted(keys, key=_by_number) if keys == sorted(keys, key=str) else keys


def _by_number(key: Any) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(key))]


def _word(key: Any) -> str:
    return str(next((getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)), key))


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def in_columns(values: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Scalars by name as a row, shape (p,), `NOT_MEASURED` where there is none."""
    return jnp.stack([values.get(name, jnp.float32(NOT_MEASURED)) for name in names])
