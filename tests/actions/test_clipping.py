from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradwatch as gw
from gradwatch.actions import AGC, AutoClip, Clip, InStepAction, ZClip
from gradwatch.backends.torch_device import TorchNamespace
from gradwatch.backends.torch_units import scale_units
from gradwatch.errors import ConfigurationError
from tests.actions import references

EPSILON = 1e-6
#: What published code gave for recorded norms; "about" says which.
PUBLISHED = json.loads((Path(__file__).parent / "published_clips.json").read_text(encoding="utf-8"))


def recorded_norms(steps: int = 300) -> list[float]:
    """A falling, noisy norm with spikes, like that of a language model."""
    random = np.random.default_rng(7)
    norms = (0.5 + 2.0 / np.sqrt(1 + np.arange(steps))) * np.exp(0.2 * random.standard_normal(steps))
    for step, factor in ((40, 8.0), (41, 30.0), (90, 3.0), (200, 500.0)):
        norms[step : step + 1] *= factor
    return [float(norm) for norm in norms]


def scales(action: InStepAction, norms: list[float], xp: Any = np) -> list[float]:
    state: tuple[Any, ...] = tuple(map(np.asarray, action.initial_state()))
    if xp is not np:
        state = tuple(torch.as_tensor(entry, dtype=torch.float64) for entry in state)
    found = []
    for norm in norms:
        array = np.array([norm]) if xp is np else torch.tensor([norm], dtype=torch.float64)
        decision = action.decide(array, state, xp)
        state = decision.state
        found.append(float(decision.scale))  # type: ignore[arg-type]
    return found


def test_zclip_follows_its_paper_step_for_step() -> None:
    norms = recorded_norms()
    limits = references.zclip_limits(norms, alpha=0.97, threshold=2.5, warmup=25)
    expected = [limit / (norm + EPSILON) if norm > limit else 1.0 for norm, limit in zip(norms, limits, strict=True)]

    assert scales(ZClip(), norms) == pytest.approx(expected, rel=1e-9)
    assert min(expected) < 0.1


def test_zclip_clips_to_the_further_limit_while_it_warms_up() -> None:
    assert scales(ZClip(max_norm=1.0), [4.0, 0.5]) == pytest.approx([0.25, 1.0], rel=1e-6)


def test_clip_per_layer_scales_each_parameter_by_its_own_norm() -> None:
    decision = Clip(per_layer=2.0).decide(np.array([4.0, 2.5, 1.0, 0.0]), (), np)

    assert decision.scale == pytest.approx([2.0 / (4.0 + EPSILON), 2.0 / (2.5 + EPSILON), 1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("percentile", [10.0, 50.0, 97.5])
def test_autoclip_follows_its_paper_step_for_step(percentile: float) -> None:
    norms = recorded_norms()
    limits = references.autoclip_limits(norms, percentile=percentile)
    expected = [min(1.0, limit / (norm + EPSILON)) for norm, limit in zip(norms, limits, strict=True)]

    assert scales(AutoClip(percentile), norms) == pytest.approx(expected, rel=1e-9)


def test_autoclip_forgets_what_is_older_than_its_history() -> None:
    norms = recorded_norms()
    expected = [
        min(1.0, float(np.percentile(norms[max(0, i - 49) : i + 1], 10)) / (norm + EPSILON))
        for i, norm in enumerate(norms)
    ]

    assert scales(AutoClip(history=50), norms) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 2, 2), (7,)])
def test_agc_clips_unit_by_unit_as_published(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, dtype=torch.float64) * torch.logspace(-4, 1, shape[0], dtype=torch.float64).view(
        -1, *[1] * (len(shape) - 1)
    )
    expected = references.agc_gradient(weight.grad.numpy(), weight.detach().numpy(), clip_factor=0.01, eps=1e-3)

    scale_units(AGC(), [weight], np.array([False]), np.array([1.0]))

    assert weight.grad.numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("action", "name"), [(ZClip(), "zclip"), (AutoClip(10.0), "autoclip 10"), (AutoClip(50.0), "autoclip 50")]
)
def test_scales_are_those_of_the_published_code(action: InStepAction, name: str) -> None:
    assert scales(action, PUBLISHED["norms"]) == pytest.approx(PUBLISHED[name], rel=1e-9)
    assert 0 < sum(scale < 1.0 for scale in PUBLISHED[name]) < 150


@pytest.mark.parametrize("case", PUBLISHED["agc"], ids=["matrix", "filters", "vector"])
def test_agc_gives_what_optax_gives(case: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.tensor(case["weight"], dtype=torch.float64))
    weight.grad = torch.tensor(case["grad"], dtype=torch.float64)

    scale_units(AGC(), [weight], np.array([False]), np.array([1.0]))

    assert weight.grad.flatten().tolist() == pytest.approx(case["clipped"], rel=1e-9)


@pytest.mark.parametrize("action", [ZClip(), AutoClip(), Clip(max_norm=1.0)], ids=repr)
def test_torch_tensors_give_the_same_scales_as_numpy(action: InStepAction) -> None:
    norms = recorded_norms(120)

    assert scales(action, norms, TorchNamespace) == pytest.approx(scales(action, norms), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("action", [ZClip(warmup=5), AutoClip()], ids=repr)
def test_a_norm_that_is_not_finite_teaches_nothing(action: InStepAction, bad: float) -> None:
    norms = recorded_norms(60)
    disturbed = [*norms[:30], bad, *norms[30:]]

    found = scales(action, disturbed)

    assert found[:30] + found[31:] == pytest.approx(scales(action, norms), rel=1e-12)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.floats(1e-3, 1e3, allow_nan=False),
)
def test_clipping_by_norm_keeps_the_direction_and_the_limit(numbers: list[float], max_norm: float) -> None:
    gradient = np.array(numbers, np.float64)
    decision = Clip(max_norm=max_norm).decide(np.array([np.linalg.norm(gradient)]), (), np)

    assert decision.scale is not None
    clipped = gradient * decision.scale

    assert np.linalg.norm(clipped) <= max_norm * (1 + 1e-6)
    assert 0 < decision.scale <= 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_clip_gives_the_parameters_that_clip_grad_norm_gives(
    optimizer: type[torch.optim.Optimizer], tmp_path: Any
) -> None:
    def trained(mode: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        steps = optimizer(model.parameters(), lr=0.05)  # type: ignore[call-arg]
        inputs = torch.randn(50, 8, 6)
        actions = [gw.Clip(max_norm=0.1)] if mode == "ours" else []
        with gw.watch(model, steps, run_dir=tmp_path / mode, actions=actions):
            for x in inputs:
                steps.zero_grad()
                (model(x) - 3.0).square().mean().backward()
                if mode == "theirs":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                steps.step()
        return [parameter.detach() for parameter in model.parameters()]

    for ours, theirs in zip(trained("ours"), trained("theirs"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Clip, "exactly one of 'max_norm'"),
        (lambda: Clip(max_norm=-1.0), "'max_norm' must be a finite number > 0: -1.0"),
        (lambda: ZClip(alpha=1.0), "'alpha' must be < 1: 1.0"),
        (lambda: ZClip(warmup=1), "'warmup' must be an integer >= 2: 1"),
        (lambda: AutoClip(101.0), r"'percentile' must be in \(0, 100\]: 101.0"),
        (lambda: AutoClip(history=1), "'history' must be an integer >= 2: 1"),
        (lambda: AGC(0.0), "'clip_factor' must be a finite number > 0: 0.0"),
    ],
)
def test_nonsense_is_refused_by_name(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()
