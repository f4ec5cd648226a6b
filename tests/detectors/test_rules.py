"""Each rule on the condition that it is for, and on what looks like it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from gradwatch.records import NOT_MEASURED
from tests.detectors import streams


def samples(steps: int, layers: int, **values: float) -> dict[str, np.ndarray]:
    return {name: np.full((len(range(0, steps, 10)), layers), value) for name, value in values.items()}


def test_a_healthy_run_is_silent() -> None:
    steps = streams.batch(
        streams.noisy(600, 8) * np.exp(-np.arange(600) / 200)[:, None],
        loss=streams.falling(600),
        lr=np.full(600, 1e-3),
        statistics=samples(600, 8, weight_norm=1.0, update_ratio=1e-3),
    )
    assert not streams.alarms(streams.found(steps))


def test_nonfinite_names_the_first_bad_layer_of_the_backward_pass() -> None:
    norms = streams.noisy(40, 5)
    norms[30, :4] = np.nan
    finding = streams.found(streams.batch(norms, loss=streams.falling(40)))["nonfinite"][0]
    assert (finding.severity, finding.first_step) == ("critical", 30)
    assert finding.evidence["first_bad_layer"] == "layer3"
    assert finding.evidence["finite_layers"] == ["layer4"]


def test_nonfinite_blames_the_loss_when_the_loss_is_nan() -> None:
    norms, loss = streams.noisy(40, 5), streams.falling(40)
    norms[30:], loss[30:] = np.nan, np.nan
    finding = streams.found(streams.batch(norms, loss=loss))["nonfinite"][0]
    assert finding.evidence["direction"] == "forward"
    assert "loss became NaN at step 30" in finding.message


def test_weights_that_are_not_finite_are_named() -> None:
    weights = np.ones((4, 5))
    weights[2, [1, 3]] = np.nan, np.inf
    steps = streams.batch(streams.noisy(40, 5), loss=streams.falling(40), statistics={"weight_norm": weights})
    finding = streams.found(steps)["nonfinite"][0]
    assert (finding.severity, finding.first_step) == ("critical", 20)
    assert finding.evidence["bad_weights"] == ["layer1.weight", "layer3.weight"]


def test_the_first_module_whose_output_is_not_finite_is_named() -> None:
    norms, means = streams.noisy(40, 3), np.ones((4, 3))
    norms[20:], means[2, 1:] = np.nan, np.nan
    steps = streams.batch(
        norms, loss=streams.falling(40), statistics={"activation_mean": means}, modules=["a", "b", "c"]
    )
    finding = streams.found(steps)["nonfinite"][0]
    assert (finding.evidence["first_bad_module"], finding.evidence["direction"]) == ("b", "forward")


@pytest.mark.parametrize(("steps", "alarmed"), [(8, False), (40, True)])
def test_steps_skipped_by_a_grad_scaler_alarm_only_when_they_do_not_end(steps: int, alarmed: bool) -> None:
    norms, reason = streams.noisy(100, 4), np.zeros(100)
    norms[:steps], reason[:steps] = np.inf, 3
    found = streams.alarms(streams.found(streams.batch(norms, skip_reason=reason, loss=streams.falling(100))))
    assert bool(found) is alarmed


def test_a_skipped_nonfinite_step_is_a_warning() -> None:
    norms, reason = streams.noisy(60, 4), np.zeros(60)
    norms[30, 1], reason[30] = np.inf, 1
    finding = streams.found(streams.batch(norms, skip_reason=reason))["nonfinite"][0]
    assert finding.severity == "warning"


def test_forty_layers_that_explode_are_one_finding() -> None:
    norms = streams.noisy(120, 40)
    norms[80:] *= 200
    findings = streams.found(streams.batch(norms))["exploding"]
    assert len(findings) == 1
    assert len(findings[0].layers) == 40
    assert findings[0].first_step == 80


def test_a_finding_resolves_when_its_condition_is_over() -> None:
    norms = streams.noisy(200, 4)
    norms[80:90] *= 200
    finding = streams.found(streams.batch(norms))["exploding"][0]
    assert (finding.first_step, finding.last_step, finding.resolved_step) == (80, 89, 90)


def test_a_single_outlier_is_a_spike_and_no_explosion() -> None:
    norms = streams.noisy(120, 6)
    norms[70] *= 500
    found = streams.alarms(streams.found(streams.batch(norms)))
    assert list(found) == ["spike"]
    assert found["spike"][0].first_step == 70


def test_heavy_tails_do_not_alarm() -> None:
    rng = np.random.default_rng(0)
    norms = streams.noisy(3000, 4) * (1 + rng.pareto(1.5, (3000, 1)))
    assert not streams.alarms(streams.found(streams.batch(norms, loss=streams.falling(3000))))


def test_deep_decay_over_depth_is_found_within_twenty_steps() -> None:
    norms = streams.noisy(20, 12) * np.exp(-1.2 * np.arange(12)[::-1])
    finding = streams.found(streams.batch(norms, loss=np.full(20, 0.69)))["vanishing"][0]
    assert finding.severity == "warning"
    assert finding.layers[0] == "layer0"
    assert finding.first_step == 0


def test_decay_over_depth_is_no_alarm_in_a_network_that_learns_before_it_shows() -> None:
    norms = streams.noisy(400, 12) * np.exp(-np.linspace(0, 1.2, 400)[:, None] * np.arange(12)[::-1])
    assert "vanishing" not in streams.found(streams.batch(norms, loss=streams.falling(400)))


def test_layers_that_stay_starved_while_the_loss_falls_stay_a_finding() -> None:
    norms = streams.noisy(400, 12) * np.exp(-1.2 * np.arange(12)[::-1])
    finding = streams.found(streams.batch(norms, loss=streams.falling(400)))["vanishing"][0]
    assert (finding.severity, finding.resolved_step) == ("warning", None)
    assert re.search(r"The loss has fallen by \d\d% all the same\.$", finding.message)


def test_starved_layers_have_recovered_when_their_norms_have() -> None:
    decay = np.where(np.arange(400) < 200, 1.2, 0.1)[:, None]
    norms = streams.noisy(400, 12) * np.exp(-decay * np.arange(12)[::-1])
    (finding,) = streams.found(streams.batch(norms, loss=streams.falling(400)))["vanishing"]
    assert finding.first_step == 0
    assert finding.resolved_step == pytest.approx(210, abs=10)


def test_starved_layers_that_rise_just_above_the_threshold_have_not_recovered() -> None:
    decay = np.where(np.arange(400) % 100 < 50, 1.2, 0.75)[:, None]  # 1.8e-6 and 2.6e-4 from end to end
    norms = streams.noisy(400, 12) * np.exp(-decay * np.arange(12)[::-1])
    (finding,) = streams.found(streams.batch(norms, loss=np.full(400, 0.69)))["vanishing"]
    assert finding.resolved_step is None


def test_a_converged_run_is_not_vanishing() -> None:
    decay = np.exp(-np.arange(800) / 40)
    norms = streams.noisy(800, 4) * decay[:, None]
    assert not streams.alarms(streams.found(streams.batch(norms, loss=2 * decay**2)))


def test_depth_is_the_order_of_execution_not_of_names() -> None:
    parameters = streams.chain(12)[::-1]
    norms = (streams.noisy(20, 12) * np.exp(-1.2 * np.arange(12)[::-1]))[:, ::-1]
    found = streams.found(streams.batch(norms, parameters=parameters, loss=np.full(20, 0.69)))
    assert found["vanishing"][0].layers[0] == "layer0"


def test_growth_towards_the_input_at_the_first_step_is_an_imbalance() -> None:
    norms = streams.noisy(5, 20) * np.exp(0.35 * np.arange(20)[::-1])
    finding = streams.found(streams.batch(norms))["imbalance"][0]
    assert finding.severity != "info"
    assert finding.evidence["direction"] == "grow"
    assert finding.value == pytest.approx(np.exp(0.35), rel=0.1)


def test_a_zero_initialised_last_layer_is_not_dead() -> None:
    norms = streams.noisy(100, 4)
    norms[0, :3] = 0.0
    norms[1:30, :3] *= np.linspace(0.01, 1, 29)[:, None]
    assert not streams.alarms(streams.found(streams.batch(norms, loss=streams.falling(100))))


def test_a_layer_at_zero_is_dead_and_a_frozen_one_is_not() -> None:
    norms = streams.noisy(60, 4)
    norms[20:, 1], norms[:, 2] = 0.0, NOT_MEASURED
    parameters = [dataclasses.replace(p, trainable=p.depth != 2) for p in streams.chain(4)]
    found = streams.alarms(streams.found(streams.batch(norms, parameters=parameters)))
    assert list(found) == ["dead"]
    assert found["dead"][0].layers == ("layer1",)


def test_layers_at_zero_are_told_from_the_last_one_which_passes_no_gradient_on() -> None:
    norms = streams.noisy(120, 6)
    norms[40:, :4] = 0.0
    finding = streams.found(streams.batch(norms, loss=streams.falling(120)))["dead"][0]
    assert finding.evidence["first_bad_layer"] == "layer3"


def test_a_hinge_at_its_floor_is_not_dead() -> None:
    norms, loss = streams.noisy(200, 4), streams.falling(200, end=0.02)
    norms[100:], loss[100:] = 0.0, 0.0
    assert not streams.alarms(streams.found(streams.batch(norms, loss=loss)))


def test_a_parameter_that_never_gets_a_gradient_is_unused() -> None:
    norms = streams.noisy(60, 4)
    norms[:, 3] = NOT_MEASURED
    finding = streams.found(streams.batch(norms))["unused"][0]
    assert finding.severity == "warning"
    assert finding.evidence["parameters"] == ["layer3.weight"]


def test_unused_is_information_where_optimizers_alternate() -> None:
    norms = streams.noisy(120, 4)
    norms[::2, :2], norms[:, 3] = NOT_MEASURED, NOT_MEASURED
    assert streams.found(streams.batch(norms))["unused"][0].severity == "info"


def test_a_rising_learning_rate_is_foreseen() -> None:
    rate = np.geomspace(1e-6, 10, 200)
    ratio = np.minimum(rate[::10], 1)[:, None] * np.ones(4)
    statistics = {"weight_norm": np.ones((20, 4)), "update_ratio": ratio}
    found = streams.found(streams.batch(streams.noisy(200, 4), lr=rate, loss=np.full(200, 2.3), statistics=statistics))
    finding = found["update_ratio"][0]
    assert rate[finding.first_step] < 0.1


def test_warm_up_and_restarts_are_no_rising_learning_rate() -> None:
    k = np.arange(600)
    rate = np.where(k < 100, (k + 1) / 100, 0.5 + 0.5 * np.cos(np.pi * (k % 150) / 150)) * 0.05
    ratio = 0.5 * rate[::10, None] * np.ones(4)
    statistics = {"weight_norm": np.ones((60, 4)), "update_ratio": ratio}
    steps = streams.batch(streams.noisy(600, 4), lr=rate, loss=streams.falling(600), statistics=statistics)
    assert not streams.alarms(streams.found(steps))


@pytest.mark.parametrize(("after", "alarmed"), [(8.0, True), (1.9, False)])
def test_a_leap_of_the_weights_alarms_when_the_loss_rises(after: float, alarmed: bool) -> None:
    statistics = samples(60, 4, weight_norm=1.0, update_ratio=1e-3)
    statistics["update_ratio"][3, 1] = 0.9
    loss = np.concatenate([np.full(31, 2.0), np.full(29, after)])
    found = streams.found(streams.batch(streams.noisy(60, 4), loss=loss, statistics=statistics), ["update_ratio"])
    assert bool(found) is alarmed


def test_updates_lost_in_bfloat16_are_a_stall() -> None:
    statistics = samples(60, 4, weight_norm=1.0, update_ratio=1e-5)
    steps = streams.batch(
        streams.noisy(60, 4),
        parameters=streams.chain(4, dtype="bfloat16"),
        lr=np.full(60, 1e-3),
        loss=np.full(60, 2.3),
        statistics=statistics,
    )
    assert streams.found(steps)["stall"][0].evidence["cause_id"] == "half_underflow"


def test_a_loss_ten_times_its_first_is_a_critical_divergence() -> None:
    loss = np.concatenate([streams.falling(50), 40 * np.ones(10)])
    finding = streams.found(streams.batch(streams.noisy(60, 4), loss=loss))["divergence"][0]
    assert (finding.severity, finding.first_step) == ("critical", 50)


def test_a_new_curriculum_is_no_divergence() -> None:
    loss = np.concatenate([streams.falling(200), streams.falling(200, seed=1)])
    norms = streams.noisy(400, 4) * np.sqrt(loss)[:, None]
    assert not streams.alarms(streams.found(streams.batch(norms, loss=loss)))


def test_a_loss_that_alternates_ever_wider_oscillates() -> None:
    loss = 2 + 0.01 * 1.05 ** np.arange(80) * (-1) ** np.arange(80)
    assert "oscillation" in streams.alarms(streams.found(streams.batch(streams.noisy(80, 4), loss=loss)))


def test_a_loss_that_never_moves_is_a_plateau_and_one_that_settled_is_not() -> None:
    rng = np.random.default_rng(0)
    flat = 2.3 + rng.normal(0, 0.02, 700)
    assert "plateau" in streams.alarms(streams.found(streams.batch(streams.noisy(700, 4), loss=flat)))
    settled = streams.batch(streams.noisy(2000, 4), loss=streams.falling(2000))
    assert "plateau" not in streams.alarms(streams.found(settled))


@pytest.mark.parametrize(("statistic", "rule"), [("saturated_fraction", "saturation"), ("dead_fraction", "dying_relu")])
def test_units_out_of_action_are_found_while_nothing_is_learnt(statistic: str, rule: str) -> None:
    shares = {statistic: np.full((6, 2), [0.1, 0.97])}
    steps = streams.batch(streams.noisy(60, 4), loss=np.full(60, 2.3), statistics=shares, modules=["a", "b"])
    finding = streams.alarms(streams.found(steps))[rule][0]
    assert finding.evidence["modules"] == ["b"]


def test_zeros_in_float16_underflow_and_zeros_in_float32_do_not() -> None:
    zeros = samples(60, 4, zero_fraction=0.7)
    for dtype, expected in (("float16", True), ("float32", False)):
        steps = streams.batch(streams.noisy(60, 4), parameters=streams.chain(4, dtype=dtype), statistics=zeros)
        assert ("underflow" in streams.found(steps)) is expected


def scales(layers: int, odd: float, *, place: int = 2, steps: int = 60) -> dict[str, np.ndarray]:
    """Samples of layers initialised alike but one, whose weights are `odd` times larger; all move equally far."""
    weights = np.full(layers, 4.0)
    weights[place] *= odd
    rows = len(range(0, steps, 10))
    return {"weight_norm": np.tile(weights, (rows, 1)), "update_ratio": np.tile(0.01 / weights, (rows, 1))}


def test_a_layer_whose_weights_begin_sixty_times_too_large_is_named() -> None:
    steps = streams.batch(streams.noisy(60, 6), loss=streams.falling(60), statistics=scales(6, 60.0))
    (finding,) = streams.found(steps)["imbalance"]
    assert (finding.severity, finding.first_step, finding.layers) == ("warning", 0, ("layer2",))
    assert (finding.evidence["sign"], finding.evidence["cause_id"]) == ("scale", "layer_scale")
    assert finding.message.startswith("The weights of 'layer2' are 60 times larger than those of the other layers")


def test_a_layer_whose_weights_all_but_vanish_is_named() -> None:
    steps = streams.batch(streams.noisy(60, 6), loss=streams.falling(60), statistics=scales(6, 1e-4))
    (finding,) = streams.found(steps)["imbalance"]
    assert finding.layers == ("layer2",)
    assert "10,000 times smaller" in finding.cause


@pytest.mark.parametrize("odd", [20.0, 1 / 140], ids=["within-the-usual-range", "the-output-layer-of-a-policy"])
def test_weights_a_little_out_of_scale_are_no_alarm(odd: float) -> None:
    steps = streams.batch(streams.noisy(60, 6), loss=streams.falling(60), statistics=scales(6, odd))
    assert not streams.alarms(streams.found(steps))


def test_a_layer_out_of_scale_that_comes_back_into_it_has_recovered() -> None:
    sampled = scales(6, 60.0, steps=200)
    sampled["weight_norm"][10:] = 4.0
    steps = streams.batch(streams.noisy(200, 6), loss=streams.falling(200), statistics=sampled)
    (finding,) = streams.found(steps)["imbalance"]
    assert finding.resolved_step == 100


def test_a_layer_that_was_too_small_has_not_recovered_while_nothing_is_learnt() -> None:
    sampled = scales(6, 1e-4, steps=400)
    sampled["weight_norm"][10:, 2] = 0.5
    steps = streams.batch(streams.noisy(400, 6), loss=np.full(400, 1.38), statistics=sampled)
    (finding,) = streams.found(steps)["imbalance"]
    assert finding.resolved_step is None


def test_a_learning_rate_of_exactly_zero_is_a_stall_from_its_first_step_on() -> None:
    rate = np.where(np.arange(200) < 120, 0.01, 0.0)
    sampled = samples(200, 4, weight_norm=1.0, update_ratio=1e-3)
    sampled["update_ratio"][12:] = 0.0
    steps = streams.batch(streams.noisy(200, 4), loss=streams.falling(200), lr=rate, statistics=sampled)
    (finding,) = streams.found(steps)["stall"]
    assert (finding.severity, finding.first_step, finding.resolved_step) == ("warning", 120, None)
    assert finding.message == "The learning rate is exactly 0 since step 120, after 0.01: no weight has moved since."
    assert finding.evidence["cause_id"] == "rate_zero"


@pytest.mark.parametrize(("zeros", "ratio"), [(10, 0.0), (200, 1e-3)], ids=["a-few-steps", "other-groups-move"])
def test_a_learning_rate_of_zero_that_stops_nothing_is_no_stall(zeros: int, ratio: float) -> None:
    rate = np.where(np.arange(200) < zeros, 0.0, 0.01)
    steps = streams.batch(
        streams.noisy(200, 4), loss=streams.falling(200), lr=rate,
        statistics=samples(200, 4, weight_norm=1.0, update_ratio=ratio or 1e-3),
    )  # fmt: skip
    assert "stall" not in streams.found(steps)


def test_a_run_that_got_used_to_its_explosion_has_not_recovered() -> None:
    norms, loss = streams.noisy(1500, 4), streams.falling(1500)
    norms[300:] *= 1e7
    loss[300:] = 1.6
    (finding,) = streams.found(streams.batch(norms, loss=loss))["exploding"]
    assert (finding.first_step, finding.resolved_step) == (300, None)


def test_larger_gradients_with_a_loss_at_its_best_are_a_new_usual() -> None:
    norms = streams.noisy(1500, 4)
    norms[300:] *= 50
    (finding,) = streams.found(streams.batch(norms, loss=streams.falling(1500)))["exploding"]
    assert finding.resolved_step is not None


def test_a_layer_that_faded_while_the_loss_fell_stays_a_finding_when_it_fades_no_further() -> None:
    norms = streams.noisy(400, 6)
    norms[:, 0] *= np.exp(-0.1 * np.clip(np.arange(400) - 60, 0, 150))
    finding = streams.found(streams.batch(norms, loss=streams.falling(400)))["vanishing"][-1]
    assert (finding.resolved_step, finding.layers[0]) == (None, "layer0")


def test_a_loss_that_fell_a_little_at_first_and_never_again_is_a_plateau() -> None:
    rng = np.random.default_rng(0)
    loss = 1.38 + 0.1 * np.exp(-np.arange(900) / 10) + rng.normal(0, 0.02, 900)
    assert "plateau" in streams.alarms(streams.found(streams.batch(streams.noisy(900, 4), loss=loss)))


def test_a_loss_far_above_its_best_is_no_plateau() -> None:
    loss = np.where(np.arange(900) < 100, streams.falling(900), 50.0)
    found = streams.found(streams.batch(streams.noisy(900, 4), loss=loss))
    assert "divergence" in found
    assert "plateau" not in found


def test_weights_that_something_else_wrote_to_are_named_as_what_killed_the_layer() -> None:
    norms = streams.noisy(160, 4)
    norms[103:, :2] = 0.0
    sampled = samples(160, 4, weight_norm=1.0, update_ratio=1e-3)
    sampled["weight_norm"][11:, 1], sampled["update_ratio"][11:, :2] = 5000.0, 0.0
    finding = streams.found(streams.batch(norms, loss=streams.falling(160), statistics=sampled))["dead"][0]
    assert finding.cause.startswith("'layer1.weight' changed from outside between steps 100 and 110")


def test_the_rate_that_led_to_the_best_loss_is_the_one_before_it() -> None:
    norms, rate = streams.noisy(160, 4), np.where(np.arange(160) < 100, 0.03, 6.0)
    loss = np.where(np.arange(160) <= 100, np.linspace(2, 1, 160), 1e6)
    norms[101:] *= 1e6
    advice = streams.found(streams.batch(norms, loss=loss, lr=rate))["exploding"][0].advice
    assert advice[0].startswith("use a learning rate of at most 0.03")
