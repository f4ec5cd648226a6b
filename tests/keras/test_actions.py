"""Actions inside the step and between steps, against trainings that Keras itself does that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradwatch as gw
from gradwatch.errors import ConfigurationError
from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from gradwatch.records import RENEWED
from tests.keras.training import (
    BACKEND,
    EXACT,
    batches,
    data,
    dense,
    difference,
    fit,
    found_at,
    gradients,
    metrics,
    recorded,
    reference,
    relative_error,
)

SGD = keras.optimizers.SGD
CLIPS: dict[str, tuple[Callable[[], Any], dict[str, float]]] = {
    "max_norm": (lambda: gw.Clip(max_norm=0.5), {"global_clipnorm": 0.5}),
    "per_layer": (lambda: gw.Clip(per_layer=0.3), {"clipnorm": 0.3}),
    "value": (lambda: gw.Clip(value=0.05), {"clipvalue": 0.05}),
}


def _clipped_norm(grads: list[Any], form: str) -> float:
    whole = np.sqrt(sum(np.sum(grad**2) for grad in grads))
    clip: Callable[[Any], Any] = {
        "": lambda grad: grad,
        "max_norm": lambda grad: grad * min(1.0, 0.5 / whole),
        "per_layer": lambda grad: grad * min(1.0, 0.3 / np.linalg.norm(grad)),
        "value": lambda grad: np.clip(grad, -0.05, 0.05),
    }[form]
    return float(np.sqrt(sum(np.sum(clip(grad) ** 2) for grad in grads)))


@pytest.mark.parametrize("form", CLIPS)
def test_clip_gives_the_weights_of_the_optimizers_own(tmp_path: Path, form: str) -> None:
    x, y = data()
    clip, own = CLIPS[form]
    watched = fit(dense(optimizer=SGD(0.05, momentum=0.9)), x, y, GradWatch(run_dir=tmp_path / "run", actions=[clip()]))
    plain = fit(dense(optimizer=SGD(0.05, momentum=0.9, **own)), x, y)
    assert difference(plain, watched) < EXACT
    coefficients = metrics(tmp_path / "run")["clip_coefficient"].to_numpy()
    first = gradients(dense(), x[:4], y[:4])
    assert coefficients[0] == pytest.approx(_clipped_norm(first, form) / _clipped_norm(first, ""), rel=1e-5)
    expected = reference(dense(optimizer=SGD(0.05, momentum=0.9, **own)), batches(x, y, epochs=2))
    assert relative_error(recorded(tmp_path / "run"), expected) < 1e-5  # of weights that differ by EXACT


@pytest.mark.parametrize("jit", [False, True])
def test_clip_and_skip_and_rate_in_one_step(tmp_path: Path, *, jit: bool) -> None:
    x, y = data(20)
    y[8] = np.nan
    actions = [gw.Clip(max_norm=0.5), gw.SkipStep(), gw.DecayLR(factor=0.5, on="exploding")]
    watched = dense(optimizer=SGD(0.05, momentum=0.9), jit_compile=jit)
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[]), epochs=1)
    keep = np.r_[0:8, 12:20]
    plain = fit(dense(optimizer=SGD(0.05, momentum=0.9, global_clipnorm=0.5)), x[keep], y[keep], epochs=1)
    assert difference(plain, watched) < EXACT
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "", "nonfinite", "", ""]


@pytest.mark.parametrize("make", [lambda: keras.optimizers.AdamW(0.01), lambda: SGD(0.05, use_ema=True)])
def test_a_skipped_batch_never_was(tmp_path: Path, make: Callable[[], Any]) -> None:
    x, y = data(20)
    y[8] = np.nan
    watched = dense(optimizer=make())
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.SkipStep()]), epochs=1)
    keep = np.r_[0:8, 12:20]
    plain = fit(dense(optimizer=make()), x[keep], y[keep], epochs=1)
    assert difference(plain, watched) < EXACT
    assert int(watched.optimizer.iterations) == 4
    assert np.isnan(recorded(tmp_path / "run")[2]).all()


SCHEDULES: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.1,
    "schedule": lambda: keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
}


class Halved(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]  # Keras has no types
    """Another schedule, halved from a step on."""

    def __init__(self, rate: Any, start: int) -> None:
        self.rate, self.start = rate, start

    def __call__(self, step: Any) -> Any:
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * keras.ops.where(keras.ops.cast(step, "int32") >= self.start, 0.5, 1.0)


@pytest.mark.parametrize("rate", SCHEDULES)
def test_the_factor_on_the_rate_is_half_the_rate(tmp_path: Path, rate: str) -> None:
    x, y = data(40)
    actions = [gw.DecayLR(factor=0.5, on="exploding")]
    watched = dense(optimizer=keras.optimizers.Adam(SCHEDULES[rate]()))
    callback = GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(3)])
    fit(watched, x, y, callback, epochs=1)
    applied = RunReader(tmp_path / "run").actions()
    assert applied["action"].tolist() == ["DecayLR"]
    start = int(applied["step"].iloc[0])
    assert start == (5 if BACKEND == "jax" else 4)
    plain = dense(optimizer=keras.optimizers.Adam(Halved(SCHEDULES[rate](), start)))
    assert difference(fit(plain, x, y, epochs=1), watched) < EXACT
    assert metrics(tmp_path / "run")["lr_factor"].tolist() == [1.0] * start + [0.5] * (10 - start)
    assert watched.optimizer._get_current_learning_rate.__func__  # the method of the class again


@pytest.mark.skipif(BACKEND == "torch", reason="the loss runs at every step there")
def test_another_rate_compiles_nothing_anew(tmp_path: Path) -> None:
    traces: dict[str, int] = {"plain": 0, "watched": 0}

    def trained(name: str, *callbacks: Any) -> None:
        def loss(y: Any, predicted: Any) -> Any:
            traces[name] += 1
            return keras.ops.mean(keras.ops.square(y - predicted))

        fit(dense(loss=loss, jit_compile=True), *data(40), *callbacks, epochs=1)

    actions = [gw.DecayLR(factor=0.5, on="exploding"), gw.Clip(max_norm=1.0)]
    trained("plain")
    trained("watched", GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(3)]))
    assert metrics(tmp_path / "run")["lr_factor"].iloc[-1] == 0.5
    assert traces["watched"] == traces["plain"]


def test_stop_ends_the_fit(tmp_path: Path) -> None:
    x, y = data(40)
    callback = GradWatch(run_dir=tmp_path / "run", actions=[gw.Stop(on="exploding")], detectors=[found_at(3)])
    history = dense().fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[callback])
    assert len(history.epoch) == 1
    assert len(recorded(tmp_path / "run")) <= 6


@pytest.mark.parametrize("scheme", ["auto", "default"])
def test_reinitialize_gives_new_weights_and_clears_their_state(tmp_path: Path, scheme: str) -> None:
    x, y = data(40)
    model = dense(optimizer=SGD(0.0, momentum=0.9))
    before = model.get_weights()
    actions = [gw.Reinitialize(scheme=scheme, on="exploding", confirm=0)]
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(3)]), epochs=1)
    after = model.get_weights()
    assert [np.allclose(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False, True]
    assert all(np.isfinite(weights).all() for weights in after)
    assert 0.5 < np.std(after[0]) / np.std(before[0]) < 2.0


def test_a_false_alarm_does_not_cost_a_trained_network_its_weights(tmp_path: Path) -> None:
    x, _ = data(200)
    y = 3 * x[:, :2]  # to be learnt, so that whatever new weights are drawn do much worse
    model = fit(dense(optimizer=keras.optimizers.Adam(0.02)), x, y, epochs=40)
    model.optimizer.learning_rate = 0.0
    before, trained = model.get_weights(), model.evaluate(x, y, verbose=0)
    actions = [gw.Reinitialize(on="exploding", confirm=0, within=15)]
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(12)]), epochs=1)
    details = RunReader(tmp_path / "run").actions()["detail"].tolist()
    assert ["initialised again" in details[0], "taken back" in details[-1]] == [True, True]
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.evaluate(x, y, verbose=0) == pytest.approx(trained)


def test_after_new_weights_what_is_usual_is_learnt_anew(tmp_path: Path) -> None:
    x, y = data(40)
    x[:24] *= 1e-3
    y[:24] *= 1e-3
    step = 4 if BACKEND == "jax" else 5
    for name, others in {"new": [gw.Reinitialize(on="exploding", confirm=0)], "same": []}.items():
        actions = [gw.ZClip(warmup=3), *others]
        callback = GradWatch(run_dir=tmp_path / name, actions=actions, detectors=[found_at(step)])
        fit(dense(optimizer=SGD(0.0)), x, y, callback, epochs=1)
    table = metrics(tmp_path / "new")
    assert table.index[table[RENEWED] == 1.0].tolist() == [6]
    assert table["clip_coefficient"].loc[6:8].tolist() == [1.0] * 3
    assert metrics(tmp_path / "same")["clip_coefficient"].loc[6] < 0.01


def test_reset_optimizer_state_empties_the_moments(tmp_path: Path) -> None:
    x, y = data(16)
    model = dense(optimizer=keras.optimizers.Adam(0.01))
    actions = [gw.ResetOptimizerState(on="exploding")]
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(1)]), epochs=1)
    start = int(RunReader(tmp_path / "run").actions()["step"].iloc[0])
    plain = fit(dense(optimizer=keras.optimizers.Adam(0.01)), x[: 4 * start], y[: 4 * start], epochs=1)
    fresh = dense(optimizer=keras.optimizers.Adam(0.01))
    fresh.set_weights(plain.get_weights())
    fit(fresh, x[4 * start :], y[4 * start :], epochs=1)
    assert difference(fresh, model) < EXACT


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_rollback_restores_weights_and_moments(tmp_path: Path, where: str) -> None:
    x, y = data(40)
    actions = [gw.Rollback(every=2, factor=1.0, on="exploding", where=where)]
    model = dense(optimizer=SGD(0.05, momentum=0.9))
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(5)]), epochs=1)
    applied = RunReader(tmp_path / "run").actions()
    assert "the state before step 4" in applied["detail"].iloc[0]
    start = int(applied["step"].iloc[0])
    keep = np.r_[0:16, 4 * start : 40]
    assert difference(fit(dense(optimizer=SGD(0.05, momentum=0.9)), x[keep], y[keep], epochs=1), model) < EXACT
    assert not (tmp_path / "run" / "snapshots").exists()


def test_a_rollback_without_room_is_refused(tmp_path: Path) -> None:
    x, y = data(8)
    with pytest.raises(ConfigurationError, match=r"Rollback\(keep=1000000000000\) needs .* of memory"):
        fit(dense(), x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.Rollback(keep=10**12)]))
    fit(dense(), x, y, GradWatch(run_dir=tmp_path / "run", overwrite=True))  # nothing is left in the way


def test_dry_run_only_records(tmp_path: Path) -> None:
    x, y = data()
    actions = [gw.SkipStep(), gw.Clip(max_norm=0.01), gw.DecayLR(on="exploding")]
    watched = dense()
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[found_at(1)], dry_run=True))
    assert difference(fit(dense(), x, y), watched) == 0.0
    assert [record.dry_run for record in RunReader(tmp_path / "run").action_list()] == [True]


ADAPTIVE: dict[str, Callable[[], Any]] = {
    "zclip": lambda: gw.ZClip(warmup=3),
    "autoclip": lambda: gw.AutoClip(percentile=50, history=8),
    "skip spikes": lambda: gw.SkipStep(factor=1.2, window=5, warmup=3),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_actions_decide_as_on_numpy(tmp_path: Path, name: str) -> None:
    x, y = data(40)
    y[32:36] *= 10
    fit(dense(optimizer=SGD(0.0)), x, y, GradWatch(run_dir=tmp_path / "run", actions=[ADAPTIVE[name]()]), epochs=1)
    action, norms = ADAPTIVE[name](), recorded(tmp_path / "run")
    state, decisions = action.initial_state(), []
    for row in norms:
        decisions.append(action.decide(row, state, np))
        state = decisions[-1].state
    table = metrics(tmp_path / "run")
    scales = [1.0 if d.scale is None else float(d.scale) for d in decisions]
    skips = [bool(d.skip) if d.skip is not None else False for d in decisions]
    assert table["clip_coefficient"].to_numpy() == pytest.approx(scales, rel=1e-5)
    assert table["skipped"].astype(bool).tolist() == skips
    assert min(scales) < 0.99 or any(skips)


def test_agc_scales_unit_by_unit(tmp_path: Path) -> None:
    x, y = data(4)
    model = dense(optimizer=SGD(1.0))
    before = model.get_weights()
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.AGC(clip_factor=0.01)]), epochs=1)
    after = model.get_weights()
    update, weights = np.linalg.norm(after[0] - before[0], axis=0), np.linalg.norm(before[0], axis=0)
    assert (update <= 0.01 * weights * 1.001).all()
    assert np.abs(after[2] - before[2]).max() > 0.02  # the last layer is spared
