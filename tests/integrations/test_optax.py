import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import gradwatch as gw
from gradwatch.backends import jax_step
from gradwatch.errors import ConfigurationError, MissingDependencyError, StopTraining
from gradwatch.integrations.optax import Watched, watch
from tests.integrations import plain

pytestmark = pytest.mark.framework("optax")

Tree = dict[str, dict[str, Any]]
X, Y = (jnp.asarray(part.numpy()) for part in plain.data())


def parameters() -> Tree:
    """The weights of the plain model, as JAX holds them."""
    arrays = [jnp.asarray(parameter.detach().numpy()) for parameter in plain.model().parameters()]
    return {f"Dense_{i}": {"kernel": arrays[2 * i].T, "bias": arrays[2 * i + 1]} for i in range(2)}


def loss_of(params: Tree, x: Any, y: Any) -> Any:
    hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return jnp.mean((hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"] - y) ** 2)


def train(
    optimizer: optax.GradientTransformation, *, steps: int = plain.STEPS, compiled: bool = True, poisoned: int = -1
) -> Tree:
    """The loop of any JAX program; it knows nothing of gradwatch."""
    updating = optax.with_extra_args_support(optimizer)

    def step(params: Tree, state: Any, x: Any, y: Any) -> tuple[Tree, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = updating.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    params = parameters()
    state = optimizer.init(params)
    for i in range(steps):
        rows = slice(i % plain.STEPS * plain.BATCH, (i % plain.STEPS + 1) * plain.BATCH)
        params, state = step(params, state, X[rows] * jnp.nan if i == poisoned else X[rows], Y[rows])
    return params


def watched(run_dir: Path, optimizer: Any = None, **settings: Any) -> Watched:
    return watch(optimizer or optax.sgd(plain.RATE), run_dir=run_dir, **settings)


def same(a: Tree, b: Tree) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize(("compiled", "steps"), [(True, plain.STEPS), (False, 2)])
def test_norms_and_losses_are_those_of_the_plain_loop(tmp_path: Path, compiled: bool, steps: int) -> None:
    with watched(tmp_path / "optax") as optimizer:
        train(optimizer, compiled=compiled, steps=steps)
    plain.train(tmp_path / "plain")

    ours = gw.load(tmp_path / "optax").grad_norms()
    theirs = gw.load(tmp_path / "plain").grad_norms()[:steps]
    assert list(ours) == ["Dense_0.kernel", "Dense_0.bias", "Dense_1.kernel", "Dense_1.bias"]
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    np.testing.assert_allclose(plain.losses(tmp_path / "optax"), plain.losses(tmp_path / "plain")[:steps], rtol=2e-5)
    assert gw.load(tmp_path / "optax").info.status == "finished"


@pytest.mark.parametrize("make", [lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.adamw(1e-2)])
def test_weights_are_bit_identical(tmp_path: Path, make: Callable[[], Any]) -> None:
    with watched(tmp_path / "optax", make()) as optimizer:
        params = train(optimizer, steps=50)

    assert same(params, train(make(), steps=50))


def test_clip_is_optax_clip_by_global_norm(tmp_path: Path) -> None:
    with watched(tmp_path / "optax", actions=[gw.Clip(max_norm=0.5)]) as optimizer:
        params = train(optimizer)
    theirs = train(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(plain.RATE)))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, theirs)
    plain.assert_clipped_to(tmp_path / "optax", 0.5)


def test_clip_by_value_is_optax_clip_and_records_what_it_amounts_to(tmp_path: Path) -> None:
    with watched(tmp_path / "optax", actions=[gw.Clip(value=0.02)]) as optimizer:
        params = train(optimizer)
    theirs = train(optax.chain(optax.clip(0.02), optax.sgd(plain.RATE)))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, theirs)
    gradient = jax.grad(loss_of)(parameters(), X[: plain.BATCH], Y[: plain.BATCH])
    left = jax.tree.map(lambda leaf: jnp.clip(leaf, -0.02, 0.02), gradient)
    expected = optax.tree.norm(left) / optax.tree.norm(gradient)
    assert gw.load(tmp_path / "optax").metrics()["clip_coefficient"][0] == pytest.approx(float(expected), rel=1e-5)


def test_norms_are_those_before_the_chain_clips(tmp_path: Path) -> None:
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(plain.RATE))
    with watched(tmp_path / "optax", chain) as optimizer:
        train(optimizer)
    plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(plain.norms(tmp_path / "optax"), plain.norms(tmp_path / "plain"), rtol=2e-5)


def test_a_skipped_step_leaves_weights_and_state_as_they_were(tmp_path: Path) -> None:
    with watched(tmp_path / "optax", optax.adam(0.1), actions=[gw.SkipStep()]) as optimizer:
        params = train(optimizer, poisoned=5)

    metrics = gw.load(tmp_path / "optax").metrics()
    assert list(metrics.index[metrics["skipped"] > 0]) == [5]
    theirs = train(optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=5), poisoned=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, theirs)


def test_decay_lr_scales_the_updates_inside_the_compiled_step(tmp_path: Path) -> None:
    rate = optax.inject_hyperparams(optax.sgd)(2.0)
    used = []
    with watched(tmp_path / "optax", rate, actions=[gw.DecayLR(factor=0.5)]) as optimizer:
        params, state, gradient = parameters(), optimizer.init(parameters()), jax.jit(jax.grad(loss_of))
        update, apply, norm = jax.jit(optimizer.update), jax.jit(optax.apply_updates), jax.jit(optax.tree.norm)
        for _ in range(20):
            grads = gradient(params, X, Y)
            updates, state = update(grads, state, params)
            params = apply(params, updates)
            used.append(float(norm(updates) / norm(grads)))

    run = gw.load(tmp_path / "optax")
    metrics = run.metrics()
    assert list(run.actions()["action"])[:1] == ["DecayLR"]
    assert metrics["lr_factor"].min() <= 0.5
    assert set(metrics["lr"]) == {2.0}
    np.testing.assert_allclose(used, metrics["lr"] * metrics["lr_factor"], rtol=1e-5)


def test_stop_is_raised_from_log(tmp_path: Path) -> None:
    optimizer = watched(tmp_path / "optax", optax.sgd(100.0), actions=[gw.Stop()])
    params, update, apply = parameters(), jax.jit(optimizer.update), jax.jit(optax.apply_updates)
    state, losses, gradient = optimizer.init(params), [], jax.jit(jax.value_and_grad(loss_of))
    with pytest.raises(StopTraining), optimizer:  # noqa: PT012 -- where it is raised is what is tested
        for _ in range(200):
            loss, grads = gradient(params, X, Y)
            updates, state = update(grads, state, params)
            params = apply(params, updates)
            losses.append(float(loss))
            optimizer.log(loss=loss)

    assert optimizer.should_stop
    assert len(losses) < 200
    np.testing.assert_array_equal(plain.losses(tmp_path / "optax"), losses)


def test_a_dry_run_changes_nothing_and_records_what_it_would_do(tmp_path: Path) -> None:
    actions = [gw.Clip(max_norm=0.5), gw.SkipStep()]
    with watched(tmp_path / "optax", actions=actions, dry_run=True) as optimizer:
        params = train(optimizer)

    assert same(params, train(optax.sgd(plain.RATE)))
    assert gw.load(tmp_path / "optax").metrics()["would_clip"].min() < 1.0


def test_accumulated_batches_make_one_row(tmp_path: Path) -> None:
    with watched(tmp_path / "optax") as optimizer:
        train(optax.MultiSteps(optimizer, 3).gradient_transformation())

    ours = plain.norms(tmp_path / "optax")
    assert len(ours) == plain.STEPS // 3
    rows = slice(0, 3 * plain.BATCH)  # of equal batches, the mean of the gradients is that of all samples
    mean = jax.tree.map(np.linalg.norm, jax.jit(jax.grad(loss_of))(parameters(), X[rows], Y[rows]))
    expected = [mean[layer][kind] for layer in ("Dense_0", "Dense_1") for kind in ("kernel", "bias")]
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5)


def test_a_scanned_loop_is_recorded_step_by_step(tmp_path: Path) -> None:
    with watched(tmp_path / "optax") as optimizer:

        @jax.jit
        def epoch(params: Tree, state: Any) -> Any:
            def step(carry: Any, batch: Any) -> Any:
                params, state = carry
                loss, grads = jax.value_and_grad(loss_of)(params, *batch)
                updates, state = optimizer.update(grads, state, params, value=loss)
                return (optax.apply_updates(params, updates), state), None

            batches = tuple(part.reshape(plain.STEPS, plain.BATCH, -1) for part in (X, Y))
            return jax.lax.scan(step, (params, state), batches)

        epoch(parameters(), optimizer.init(parameters()))
    plain.train(tmp_path / "plain")

    np.testing.assert_allclose(plain.norms(tmp_path / "optax"), plain.norms(tmp_path / "plain"), rtol=2e-5)


def test_weight_norms_and_update_ratios_are_sampled(tmp_path: Path) -> None:
    with watched(tmp_path / "optax", stats_every=5) as optimizer:
        train(optimizer)

    run = gw.load(tmp_path / "optax")
    weights, ratios = (run.statistic(name).dropna() for name in ("weight_norm", "update_ratio"))
    assert list(weights.index) == list(ratios.index) == [0, 5, 10]
    first = parameters()["Dense_0"]["kernel"]
    np.testing.assert_allclose(weights["Dense_0.kernel"][0], np.linalg.norm(first), rtol=1e-6)
    expected = plain.RATE * run.grad_norms()["Dense_0.kernel"][0] / np.linalg.norm(first)
    np.testing.assert_allclose(ratios["Dense_0.kernel"][0], expected, rtol=1e-5)


def test_a_second_training_goes_on_in_the_record(tmp_path: Path) -> None:
    with watched(tmp_path / "optax") as optimizer:
        train(optimizer)
        train(optimizer)

    assert list(gw.load(tmp_path / "optax").steps) == list(range(2 * plain.STEPS))


def test_a_compiled_step_stays_valid_after_close(tmp_path: Path) -> None:
    optimizer = watched(tmp_path / "optax", actions=[gw.DecayLR(factor=0.5)])
    params, update = parameters(), jax.jit(optimizer.update)
    state, grads = optimizer.init(params), jax.jit(jax.grad(loss_of))(params, X, Y)
    for _ in range(2):
        updates, state = update(grads, state, params)
        optimizer.close()

    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -plain.RATE * g, rtol=1e-6), updates, grads)
    assert len(gw.load(tmp_path / "optax").steps) == 1


def test_frozen_parameters_have_no_numbers(tmp_path: Path) -> None:
    inner = watched(tmp_path / "optax")
    labels = {"Dense_0": "frozen", "Dense_1": "trained"}
    chain = optax.multi_transform({"trained": inner, "frozen": optax.set_to_zero()}, labels)
    with inner:
        train(chain)

    assert list(gw.load(tmp_path / "optax").grad_norms()) == ["Dense_1.kernel", "Dense_1.bias"]


def test_layers_stand_in_the_order_of_definition(tmp_path: Path) -> None:
    leaf = {"kernel": jnp.ones(2)}
    with watched(tmp_path / "sorted") as by_number, watched(tmp_path / "kept") as as_defined:
        by_number.init({f"Dense_{i}": leaf for i in (0, 1, 10, 2)})
        as_defined.init({"params": {"stem": leaf, "blocks": [leaf, leaf], "head": leaf}, "count": jnp.zeros((), int)})

    names = [[p.layer for p in gw.load(tmp_path / name).info.parameters] for name in ("sorted", "kept")]
    assert names == [["Dense_0", "Dense_1", "Dense_2", "Dense_10"], ["stem", "blocks.0", "blocks.1", "head"]]


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ([gw.Rollback()], r"the weights of a JAX loop are not ours to change: Rollback"),
        ([gw.AGC()], r"put optax\.adaptive_grad_clip into the chain instead of AGC"),
    ],
)
def test_what_cannot_be_applied_is_refused_at_the_call(tmp_path: Path, actions: list[Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        watched(tmp_path / "optax", actions=actions)


def test_another_model_needs_another_optimizer(tmp_path: Path) -> None:
    with watched(tmp_path / "optax") as optimizer:
        optimizer.init(parameters())
        with pytest.raises(ConfigurationError, match="'init' got other parameters than before"):
            optimizer.init({"other": jnp.ones(2)})


def test_a_failure_of_ours_leaves_the_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(jax_step, "norms_of", broken)
    with watched(tmp_path / "optax") as optimizer:
        params = train(optimizer)

    assert same(params, train(optax.sgd(plain.RATE)))
    assert "ours" in str(gw.load(tmp_path / "optax").info.overhead["errors"])


@pytest.mark.parametrize("name", ["optax", "skorch"])
def test_a_missing_package_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"gradwatch.integrations.{name}", raising=False)

    with pytest.raises(MissingDependencyError, match=rf'pip install "gradwatch\[{name}\]"'):
        importlib.import_module(f"gradwatch.integrations.{name}")
