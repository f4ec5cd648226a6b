"""The loops of the Flax documentation, Linen's `TrainState` and NNX's `Optimizer`, with one line changed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import gradwatch as gw
from gradwatch.integrations.optax import watch
from tests.extras import CHOSEN
from tests.integrations import plain

if "flax" in CHOSEN["needs"]:
    from flax import linen, nnx
    from flax.training.train_state import TrainState

pytestmark = [pytest.mark.framework("optax"), pytest.mark.needs("flax")]

X, Y = (jnp.asarray(part.numpy()) for part in plain.data())
BATCHES = [slice(i * plain.BATCH, (i + 1) * plain.BATCH) for i in range(plain.STEPS)]


def agrees(run_dir: Path, grads: Any, layers: list[str]) -> None:
    """The first recorded step is what JAX computes of the same gradients, and the layers stand in order."""
    run = gw.load(run_dir)
    recorded = run.grad_norms().iloc[0]
    assert list(run.grad_norms(by="layer")) == layers
    assert set(recorded.index) == {f"{layer}.{kind}" for layer in layers for kind in ("kernel", "bias")}
    np.testing.assert_allclose(sorted(recorded), sorted(map(np.linalg.norm, jax.tree.leaves(grads))), rtol=1e-6)


def test_a_train_state_of_linen(tmp_path: Path) -> None:
    class Net(linen.Module):  # type: ignore[misc]  # flax is not always there
        @linen.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            return linen.Dense(1)(jnp.tanh(linen.Dense(16)(x)))

    net = Net()
    optimizer = watch(optax.adam(1e-2), run_dir=tmp_path / "linen", actions=[gw.Clip(max_norm=100.0), gw.SkipStep()])
    state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=optimizer)

    def loss_of(params: Any, rows: Any, state: Any) -> Any:
        return jnp.mean((state.apply_fn({"params": params}, X[rows]) - Y[rows]) ** 2)

    @jax.jit
    def step(state: Any, start: Any) -> Any:
        rows = start + jnp.arange(plain.BATCH)
        loss, grads = jax.value_and_grad(loss_of)(state.params, rows, state)
        return state.apply_gradients(grads=grads), loss, grads

    first, losses = None, []
    with optimizer:
        for rows in BATCHES:
            state, loss, grads = step(state, rows.start)
            optimizer.log(loss=loss)
            losses.append(float(loss))
            first = grads if first is None else first

    np.testing.assert_array_equal(plain.losses(tmp_path / "linen"), losses)
    agrees(tmp_path / "linen", first, ["Dense_1", "Dense_0"])  # Linen numbers the outer call first


def test_an_optimizer_of_nnx(tmp_path: Path) -> None:
    class Net(nnx.Module):  # type: ignore[misc]  # flax is not always there
        def __init__(self, rngs: Any) -> None:
            self.hidden, self.out = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(jnp.tanh(self.hidden(x)))

    net = Net(nnx.Rngs(0))
    watched = watch(optax.adam(1e-2), run_dir=tmp_path / "nnx")
    optimizer = nnx.Optimizer(net, watched, wrt=nnx.Param)

    @nnx.jit  # type: ignore[untyped-decorator]
    def step(net: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        optimizer.update(net, grads)
        return loss, grads

    with watched:
        firsts = [step(net, optimizer, X[rows], Y[rows])[1] for rows in BATCHES]

    assert len(gw.load(tmp_path / "nnx").steps) == plain.STEPS
    agrees(tmp_path / "nnx", firsts[0], ["hidden", "out"])
