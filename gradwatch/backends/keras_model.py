"""What a Keras model consists of: its trainable variables with layer, depth, kind and following activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from gradwatch.errors import ModelError
from gradwatch.records import Parameter

#: Keras's name of an activation function to the class that every framework has for it.
_ACTIVATIONS = {
    "celu": "CELU", "elu": "ELU", "exponential": "Exponential", "gelu": "GELU", "hard_sigmoid": "Hardsigmoid",
    "hard_silu": "Hardswish", "hard_tanh": "Hardtanh", "leaky_relu": "LeakyReLU", "log_sigmoid": "LogSigmoid",
    "log_softmax": "LogSoftmax", "mish": "Mish", "relu": "ReLU", "relu6": "ReLU6", "selu": "SELU",
    "sigmoid": "Sigmoid", "silu": "SiLU", "softmax": "Softmax", "softplus": "Softplus", "softsign": "Softsign",
    "tanh": "Tanh", "tanh_shrink": "Tanhshrink",
}  # fmt: skip
#: Layers that may stand between a layer and its activation.
_TRANSPARENT = (
    keras.layers.Dropout, keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D,
    keras.layers.Flatten, keras.layers.Reshape, keras.layers.Identity, keras.layers.GaussianNoise,
    keras.layers.GaussianDropout, keras.layers.BatchNormalization, keras.layers.LayerNormalization,
    keras.layers.GroupNormalization, keras.layers.UnitNormalization,
)  # fmt: skip
_ACTIVATION_LAYERS = {
    keras.layers.ReLU: "ReLU", keras.layers.LeakyReLU: "LeakyReLU", keras.layers.PReLU: "PReLU",
    keras.layers.ELU: "ELU", keras.layers.Softmax: "Softmax",
}  # fmt: skip
_FARTHEST = 6  # layers between a layer and its activation


def _is_chief(optimizer: Any) -> bool:
    strategy = getattr(optimizer, "_distribution_strategy", None)
    cluster = getattr(strategy, "cluster_resolver", None)
    if cluster is None or not cluster.task_type:
        return True
    chief = "chief" if "chief" in cluster.cluster_spec().jobs else "worker"
    return (cluster.task_type, cluster.task_id) == (chief, 0)


class Columns:
    """The trainable variables of a model, one column of the record each.

    A variable that is frozen now has its column too, so that thawing it later changes nothing.

    Args:
        model: A built Keras model.
        optimizers: Variables that they hold and the model does not come last.

    Attributes:
        parameters: Their descriptions, in column order.
        variables: The Keras variables, in column order.
        is_chief: Whether this process writes the record: of several workers, TensorFlow's chief.

    Raises:
        ModelError: The model is not built or has nothing to train.
    """

    def __init__(self, model: keras.Model, optimizers: Iterable[Any] = ()) -> None:
        optimizers = list(optimizers)
        self.is_chief = all(map(_is_chief, optimizers))
        owners = list(_owners(model))
        if not owners:
            why = "has nothing to train" if model.built else "is not built: call it on one batch first"
            raise ModelError(f"{type(model).__name__} {model.name!r} {why}")
        self.variables: list[Any] = []
        self.parameters: list[Parameter] = []
        order = [layer for layer, _ in owners]
        depth: dict[str, int] = {}
        prefix = _common_prefix([variable.path for _, variables in owners for variable in variables])
        for layer, variables in owners:
            activation = _activation_after(layer, order)
            for variable in variables:
                name = self._unused(variable.path.removeprefix(prefix))
                home = name.rpartition("/")[0] or name
                self._add(variable, name, layer=home, depth=depth.setdefault(home, len(depth)), activation=activation,
                          kind=type(layer).__name__)  # fmt: skip
        self._column = {key: column for column, v in enumerate(self.variables) for key in _keys(v)}
        for optimizer in optimizers:
            for variable in getattr(optimizer, "_trainable_variables", ()):
                if id(variable) not in self._column:
                    self._column.update(dict.fromkeys(_keys(variable), len(self.variables)))
                    name = self._unused(getattr(variable, "path", variable.name))
                    self._add(variable, name, layer=name.rpartition("/")[0] or name, depth=len(depth))

    def __len__(self) -> int:
        return len(self.variables)

    def of(self, variable: Any) -> int | None:
        """The column of a Keras variable, or of the framework's own variable inside it."""
        return self._column.get(id(variable))

    def _unused(self, name: str) -> str:
        taken = {parameter.name for parameter in self.parameters}
        unused, number = name, 1
        while unused in taken:
            number += 1
            unused = f"{name}:{number}"
        return unused

    def _add(self, variable: Any, name: str, **facts: Any) -> None:
        self.variables.append(variable)
        dtype = keras.backend.standardize_dtype(variable.dtype)
        trainable = bool(variable.trainable)
        self.parameters.append(Parameter(name, shape=tuple(variable.shape), dtype=dtype, trainable=trainable, **facts))


def optimizers_of(model: keras.Model) -> list[Any]:
    """The optimizers of a model: the compiled one first, then those that it keeps as attributes."""
    found: list[Any] = []
    kept = [value for name, value in vars(model).items() if name != "_optimizer"]
    for value in [getattr(model, "optimizer", None), *kept]:
        for each in value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else (value,):
            if isinstance(each, keras.optimizers.Optimizer) and not any(each is other for other in found):
                found.append(each)
    return found


def _keys(variable: Any) -> Iterator[int]:
    yield id(variable)
    if isinstance(variable, keras.Variable) and keras.backend.backend() == "tensorflow":
        yield id(variable.value)


def _common_prefix(paths: Sequence[str]) -> str:
    """The name of the model, where it stands before every path."""
    first = paths[0].partition("/")[0] + "/"
    return first if all(path.startswith(first) and path.count("/") > 1 for path in paths) else ""


def _owners(model: keras.Model) -> Iterator[tuple[Any, list[Any]]]:
    """Layers that own variables to train, in order of the graph or of definition; a cell counts as its RNN layer."""
    seen: set[int] = set()

    def visit(layer: Any, shown: Any) -> Iterator[tuple[Any, list[Any]]]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        own = [v for v in getattr(layer, "_trainable_variables", ()) if id(v) not in seen]
        seen.update(map(id, own))
        if own:
            yield shown, own
        for child in _children(layer):
            yield from visit(child, layer if child is getattr(layer, "cell", None) else child)

    yield from visit(model, model)


def _children(layer: Any) -> list[Any]:
    direct = list(layer.layers) if isinstance(layer, keras.Model) else []
    known = {id(child) for child in direct}
    return direct + [child for child in getattr(layer, "_layers", ()) if id(child) not in known]


def activation_of(layer: Any) -> str:
    """The activation that a layer ends with, or is; empty for none."""
    for kind, name in _ACTIVATION_LAYERS.items():
        if isinstance(layer, kind):
            return name
    function = getattr(layer, "activation", None)
    if function is None or isinstance(layer, keras.layers.RNN):
        return ""
    name = getattr(function, "__name__", type(function).__name__)
    return "" if name == "linear" else _ACTIVATIONS.get(name, name)


def _activation_after(layer: Any, order: Sequence[Any]) -> str:
    """The activation that follows a layer's weights, looking through normalisation and dropout."""
    found = activation_of(layer)
    for _ in range(_FARTHEST):
        if found:
            break
        layer = _next(layer, order)
        if layer is None or not (isinstance(layer, _TRANSPARENT) or _is_activation(layer)):
            break
        found = activation_of(layer)
    return found


def _is_activation(layer: Any) -> bool:
    return isinstance(layer, (keras.layers.Activation, *_ACTIVATION_LAYERS))


def _next(layer: Any, order: Sequence[Any]) -> Any:
    """The layer that takes this one's output: by the graph, or by the order of definition."""
    for node in getattr(layer, "_outbound_nodes", ()):
        if isinstance(node.operation, keras.layers.Layer):
            return node.operation
    place = next((i for i, other in enumerate(order) if other is layer), None)
    return order[place + 1] if place is not None and place + 1 < len(order) else None
