"""The decision table: every row is sound, and symptoms lead to the cause that a person would name."""

from __future__ import annotations

from typing import Any

import pytest

from gradwatch.diagnosis import CAUSES, TABLE, Symptoms, cause_of, diagnosed
from gradwatch.diagnosis.phrases import TERMS
from gradwatch.records import RULES, Finding, Parameter


def layers(count: int, activation: str = "ReLU", **more: Any) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"fc{i}.weight", shape=(8, 8), depth=i, activation=activation, **more) for i in range(count))


def case(rule: str, *, first: int = 50, parameters: tuple[Parameter, ...] = layers(4), **more: Any) -> Symptoms:
    evidence, names = more.pop("evidence", {}), more.pop("names", tuple(p.layer for p in parameters))
    finding = Finding(f"{rule}-{first}", rule, "warning", first, first, layers=names, evidence=evidence)
    return Symptoms(finding, parameters, **more)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.cause}-{'-'.join(row.when)}")
def test_a_row_names_known_causes_rules_and_tests(row: Any) -> None:
    assert row.cause in CAUSES
    assert set(row.rules) <= set(RULES)
    for test in row.when:
        assert isinstance(getattr(Symptoms, test.removeprefix("not ")), property), test


def test_every_cause_stands_in_the_table() -> None:
    assert {row.cause for row in TABLE} == set(CAUSES)


@pytest.mark.parametrize("key", sorted(CAUSES))
@pytest.mark.parametrize("framework", ["", "torch", "keras"])
def test_every_cause_can_be_worded_with_nothing_known(key: str, framework: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("gradwatch.diagnosis.table.cause_of", lambda symptoms: key)
    finding = diagnosed(case("vanishing"), framework=framework)
    assert finding.cause
    assert finding.advice
    assert "{" not in finding.cause + "".join(finding.advice)
    assert "nan" not in (finding.cause + " ".join(finding.advice)).split()


def test_every_framework_has_every_term() -> None:
    assert {frozenset(terms) for terms in TERMS.values()} == {frozenset(TERMS[""])}


@pytest.mark.parametrize(
    ("symptoms", "cause"),
    [
        (case("nonfinite", evidence={"where": "loss"}), "bad_batch"),
        (case("nonfinite", evidence={"where": "gradient"}), "loss_domain"),
        (case("nonfinite", evidence={"where": "loss"}, least_loss=1e-4), "loss_domain"),
        (case("nonfinite", parameters=layers(3, dtype="float16")), "half_overflow"),
        (case("nonfinite", norm_rise=6.0, first_norm=1.0), "learning_rate"),
        (case("nonfinite", first=0, parameters=layers(3, "Exponential")), "activation"),
        (case("nonfinite", first=0, parameters=layers(3, "ReLU"), evidence={"where": "loss"}), "output_layer"),
        (case("spike"), "bad_batch"),
        (case("update_ratio", rate_growth=0.05, rate=0.1, stable_rate=0.01), "learning_rate"),
        (case("imbalance", first=0, first_drop=-8.0, first_fit=0.95), "init_large"),
        (case("exploding", first=0, first_norm=1e5, parameters=layers(20)), "init_large"),
        (case("divergence", first=1, first_norm=1e5, first_loss=1e4), "data_scale"),
        (
            case("vanishing", first=0, parameters=layers(10, "Sigmoid"), evidence={"sign": "depth"}),
            "saturating_activation",
        ),
        (case("vanishing", first=0, parameters=layers(30, ""), first_drop=12.0), "init_small"),
        (case("vanishing", evidence={"sign": "drift", "drifted": True}), "drift"),
        (case("dead", first=0, evidence={"all_layers": True, "from_start": True}), "dying_relu"),
        (case("dead", parameters=(*layers(3), Parameter("out.weight", depth=9)), names=("fc1",)), "killed_units"),
        (case("dead", first=0, evidence={"from_start": True}, names=("fc2",)), "unused_layers"),
        (case("unused"), "unused_layers"),
        (case("underflow"), "half_underflow"),
        (case("stall", evidence={"rounded": True}), "half_underflow"),
        (case("stall"), "learning_rate_small"),
        (case("vanishing", update_spread=1.0, update_ratio=0.05), "weight_decay"),
        (
            case("exploding", usual_norm=50.0, first_norm=1.0, steady_share=0.9),
            "gradients_not_cleared",
        ),
        (
            case("exploding", first=0, first_norm=1e5, first_loss=1e6, usual_scale=1.4, parameters=layers(9)),
            "data_scale",
        ),
        (case("update_ratio", first=0, odd_layer="fc2", odd_factor=60.0), "layer_scale"),
        (case("imbalance", first=0, odd_layer="blocks.0.qkv", odd_factor=100.0), "attention_logits"),
        (case("stall", evidence={"sign": "rate"}), "rate_zero"),
        (case("dead", replaced=("fc1.bias",)), "weights_replaced"),
        (
            case(
                "nonfinite", evidence={"where": "gradient", "first_bad_layer": "fc1", "finite_layers": ["fc2", "fc3"]}
            ),
            "inner_gradient",
        ),
        (
            case("nonfinite", evidence={"where": "gradient", "first_bad_layer": "fc3", "finite_layers": ["fc0"]}),
            "loss_domain",
        ),
    ],
)
def test_symptoms_lead_to_their_cause(symptoms: Symptoms, cause: str) -> None:
    assert cause_of(symptoms) == cause


def test_advice_speaks_of_the_users_layers_and_framework() -> None:
    symptoms = case("vanishing", first=0, parameters=layers(10, "Sigmoid"), names=("fc0", "fc1", "fc2"))
    advice = diagnosed(symptoms, framework="torch").advice
    assert advice[0].startswith("replace Sigmoid in 'fc0' to 'fc2' by nn.LeakyReLU")


def test_advice_names_the_last_stable_learning_rate() -> None:
    symptoms = case("update_ratio", rate_growth=0.05, rate=0.1, stable_rate=2.8e-3)
    assert "use a learning rate of at most 0.0028" in diagnosed(symptoms).advice[0]


def test_a_rate_that_rose_is_told_with_where_it_came_from() -> None:
    symptoms = case("exploding", rate=6.0, stable_rate=0.03, rate_base=0.03, rate_base_step=122)
    assert "the learning rate is too high (6, up from 0.03 since step 123)" in diagnosed(symptoms).cause


def test_a_rate_that_fell_is_told_as_it_is() -> None:
    symptoms = case("exploding", rate=0.49, rate_jump=4.0, rate_base=0.49, rate_base_step=345)
    assert "the learning rate is too high (0.49)" in diagnosed(symptoms).cause


def test_a_layer_out_of_scale_is_named_with_how_far_it_is() -> None:
    symptoms = case("update_ratio", first=0, odd_layer="fc2", odd_factor=1 / 1023)
    assert diagnosed(symptoms).cause.endswith(
        "unlike the other layers: its weights are 1,000 times smaller than theirs"
    )


def test_a_gradient_that_breaks_inside_the_network_is_located_between_two_layers() -> None:
    evidence = {"where": "gradient", "first_bad_layer": "fc1", "finite_layers": ["fc3", "fc2"]}
    assert (
        "finite down to 'fc2', and NaN or infinite from 'fc1' on"
        in diagnosed(case("nonfinite", evidence=evidence)).cause
    )


def test_clipping_is_advised_with_the_share_of_steps_below() -> None:
    advice = diagnosed(case("spike", below_one=0.97)).advice
    assert any("clip to a global norm of 1.0: 97% of your steps" in line for line in advice)


def test_a_recurring_bad_batch_is_recognised() -> None:
    advice = diagnosed(case("spike", evidence={"steps": [100, 156, 212]})).advice
    assert any("recurs every 56 steps" in line for line in advice)


def test_a_cause_that_is_there_is_kept() -> None:
    finding = Finding("x-1", "vanishing", "warning", 1, 1, cause="mine", advice=("do",))
    assert diagnosed(Symptoms(finding, layers(2))) == finding
