import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigurationError, ModelError
from gradwatch.preflight import Preflight, depth_slope, judge, preflight
from gradwatch.probes import LayerProbe
from gradwatch.reader import RunReader
from gradwatch.records import Parameter
from gradwatch.watcher import Watcher

pytestmark = pytest.mark.framework("torch")


def deep(activation: type[nn.Module], *, layers: int = 12, width: int = 32, gain: float = 1.0) -> nn.Sequential:
    """A chain of linear layers with weights of standard deviation gain / sqrt(width)."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(width))
        parts += [linear, activation()]
    return nn.Sequential(*parts, nn.Linear(width, 4))


def check(model: nn.Module) -> Preflight:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(64, 32, generator=generator), torch.randn(64, 4, generator=generator)
    return preflight(model, inputs, targets, nn.functional.mse_loss)


def test_sigmoid_in_depth_vanishes_at_the_first_layer_because_of_the_sigmoid() -> None:
    found = check(deep(nn.Sigmoid))

    assert (found.verdict, found.where) == ("vanishing", "0")
    assert "Sigmoid layers passes on at most a quarter" in found.cause
    assert found.advice[0] == "LeakyReLU or PReLU in place of Sigmoid in '0' to '22'"


def test_large_weights_explode_towards_the_input() -> None:
    found = check(deep(nn.ReLU, gain=4.0))

    assert (found.verdict, found.where) == ("exploding", "0")
    assert "too large" in found.cause
    assert "Kaiming" in found.advice[0]


def test_small_weights_vanish_because_of_the_initialisation() -> None:
    found = check(deep(nn.ReLU, gain=0.4))

    assert found.verdict == "vanishing"
    assert "too small" in found.cause


@pytest.mark.parametrize(("activation", "gain"), [(nn.ReLU, math.sqrt(2.0)), (nn.Tanh, 1.3)])
def test_critical_initialisation_is_healthy(activation: type[nn.Module], gain: float) -> None:
    found = check(deep(activation, gain=gain))

    assert found.is_healthy
    assert abs(found.slope) < 0.3
    assert found.advice == ()


def test_saturated_tanh_is_named_as_the_cause() -> None:
    found = check(deep(nn.Tanh, layers=20, gain=6.0))

    assert found.verdict == "exploding"
    assert "saturate" in found.cause


def test_dead_relu_layer_is_found() -> None:
    model = deep(nn.ReLU, layers=3, gain=math.sqrt(2.0))
    nn.init.constant_(model[2].bias, -100.0)  # type: ignore[arg-type]  # a Linear's bias

    found = check(model)

    assert (found.verdict, found.where) == ("dead", "2")


def test_overflow_in_the_forward_pass_is_named_with_its_layer() -> None:
    model = deep(nn.ReLU, layers=4)
    nn.init.constant_(model[4].weight, 1e38)  # type: ignore[arg-type]  # a Linear's weight

    found = check(model)

    assert (found.verdict, found.where) == ("nonfinite", "4")


def test_unused_parameters_are_listed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    assert check(Half()).unused == ("forgotten.weight", "forgotten.bias")


def test_the_model_is_left_untouched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 4))
    model[0].weight.grad = torch.ones(32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    check(model)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model[0].weight.grad, torch.ones(32, 32))
    assert model[4].weight.grad is None
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_norms_are_those_of_backward() -> None:
    model = deep(nn.Tanh, layers=3)
    found = check(model)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(64, 32, generator=generator), torch.randn(64, 4, generator=generator)
    nn.functional.mse_loss(model(inputs), targets).backward()

    grads = [parameter.grad.flatten() for parameter in model[0].parameters() if parameter.grad is not None]
    expected = torch.cat(grads).double().norm()

    assert found.layers[0].grad_norm == pytest.approx(float(expected), rel=1e-6)


def test_show_prints_verdict_cause_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    check(deep(nn.Sigmoid)).show()

    printed = capsys.readouterr().out
    assert "vanishing" in printed
    assert "LeakyReLU" in printed
    assert "Linear+Sigmoid" in printed


def test_plot_shows_a_point_per_layer() -> None:
    figure = check(deep(nn.Tanh)).plot()

    lines = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [13, 13]  # type: ignore[arg-type]
    assert figure.axes[0].get_yscale() == "log"


def test_slope_ignores_what_is_zero_or_not_finite() -> None:
    assert depth_slope([1e-4, 0.0, 1e-2, math.nan, 1.0]) == pytest.approx(math.log(10.0))


def test_two_layers_give_no_slope() -> None:
    layers = [
        LayerProbe("a", activation_std=1.0, output_grad_rms=1e-9),
        LayerProbe("b", activation_std=1.0, output_grad_rms=1.0),
    ]

    assert judge(0.5, layers).is_healthy


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'model' must be a torch\.nn\.Module or a Keras model: int"):
        preflight(3, None, None, nn.functional.mse_loss)


def test_what_preflight_found_is_kept_with_the_record(run_dir: Path) -> None:
    check = judge(0.5, [LayerProbe("0", kind="Linear", activation_std=1.0, grad_norm=math.inf)])
    with Watcher([Parameter("0.weight")], run_dir=run_dir, preflight=check):
        pass

    kept = RunReader(run_dir).info.config["preflight"]
    assert kept == check.to_json()
    assert kept["layers"][0]["grad_norm"] == "inf"
    assert kept["layers"][0]["output_grad_rms"] is None


def test_something_else_than_a_preflight_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'preflight' must be what gradwatch.preflight returned: 3"):
        Watcher([Parameter("0.weight")], run_dir=run_dir, preflight=3)  # type: ignore[arg-type]  # on purpose
