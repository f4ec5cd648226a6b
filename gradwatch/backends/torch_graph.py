"""Reads the autograd graph behind a loss once: in which order parameters were used, which activation follows each."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Nodes that are looked at; a recurrent network unrolled over many steps has far more than are needed.
MOST_NODES = 20_000
#: Nodes between a layer and its activation.
_MOST_HOPS = 6

_ACTIVATIONS = {
    "Relu": "ReLU", "Threshold": "ReLU", "Tanh": "Tanh", "Sigmoid": "Sigmoid", "Gelu": "GELU", "Silu": "SiLU",
    "LeakyRelu": "LeakyReLU", "Elu": "ELU", "Celu": "CELU", "Selu": "SELU", "Hardtanh": "Hardtanh",
    "Hardswish": "Hardswish", "Hardsigmoid": "Hardsigmoid", "Mish": "Mish", "Softplus": "Softplus",
    "Softmax": "Softmax", "LogSoftmax": "LogSoftmax", "LogSigmoid": "LogSigmoid", "PreluKernel": "PReLU",
    "RreluWithNoise": "RReLU",
}  # fmt: skip
#: What may stand between a parameter and the operation that uses it.
_WRAPPINGS = {"T", "Transpose", "Permute", "View", "Unsqueeze", "Expand", "ToCopy", "Clone", "Reshape", "Alias"}
#: What may stand between a layer and its activation.
_TRANSPARENT = _WRAPPINGS | {
    "UnsafeView", "ReshapeAlias", "Squeeze", "Add", "NativeDropout", "NativeBatchNorm", "CudnnBatchNorm",
    "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "MaxPool2DWithIndices", "MaxPool1D", "AvgPool2D",
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """How the forward pass used a parameter.

    Args:
        order: Number of the first operation that did; operations are numbered as they run.
        activation: Type of the activation that follows; empty for none.
    """

    order: int
    activation: str = ""


Uses = dict[int, Use]


def read_graph(root: Any, place_of: Mapping[int, int]) -> Uses:
    """How the graph behind `root` uses parameters.

    Args:
        root: The `grad_fn` of the loss; its backward pass may be over.
        place_of: `id` of a parameter to its place.

    Returns:
        Place to use, of the parameters that were found.
    """
    users, leaves = _walk(root)
    uses: Uses = {}
    for leaf in leaves:
        place = place_of.get(id(leaf.variable))
        operations = [] if place is None else list(_operations(leaf, users))
        if place is not None and operations:
            first = min(operations, key=_order)
            uses[place] = Use(_order(first), _activation_after(first, users))
    return uses


def _walk(root: Any) -> tuple[dict[Any, list[Any]], list[Any]]:
    """Node to the nodes that use its output, breadth first from the loss; and the nodes that hold parameters."""
    users: dict[Any, list[Any]] = {root: []}
    leaves: list[Any] = []
    waiting = deque([root])
    while waiting and len(users) < MOST_NODES:
        node = waiting.popleft()
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source not in users:
                users[source] = []
                (leaves if hasattr(source, "variable") else waiting).append(source)
            users[source].append(node)
    return users, leaves


def _operations(leaf: Any, users: Mapping[Any, list[Any]]) -> Iterator[Any]:
    """The operations that use a parameter, past what only reshapes it."""
    waiting = [(user, 0) for user in users[leaf]]
    while waiting:
        node, hops = waiting.pop()
        if _kind(node) in _WRAPPINGS and hops < _MOST_HOPS:
            waiting += [(user, hops + 1) for user in users[node]]
        else:
            yield node


def _activation_after(operation: Any, users: Mapping[Any, list[Any]]) -> str:
    nodes = [operation]
    for _ in range(_MOST_HOPS):
        nodes = [user for node in nodes for user in users[node]]
        for node in nodes:
            if found := _ACTIVATIONS.get(_kind(node)):
                return found
        nodes = [node for node in nodes if _kind(node) in _TRANSPARENT]
    return ""


def _kind(node: Any) -> str:
    """`Relu` for a `ReluBackward0`."""
    return _bare(node.name())


@functools.cache
def _bare(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name)


def _order(node: Any) -> int:
    return int(node._sequence_nr())
