from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.remedies import initialize, insert_norm, mend_output, replace_activation
from gradwatch.remedies.initialization import fill


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def chain(activation: type[nn.Module], *, depth: int = 12, width: int = 5) -> nn.Sequential:
    sizes = [2, *[width] * depth]
    layers = [[nn.Linear(a, b), activation()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair], nn.Linear(width, 1), nn.Sigmoid())


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ReLU, Exponential])
def test_a_fitted_network_passes_its_gradient_through_all_layers(activation: type[nn.Module]) -> None:
    model, batch = chain(activation), torch.randn(64, 2)

    initialize(model, batch=batch)

    (model(batch) - torch.rand(64, 1)).square().mean().backward()
    norms = [float(p.grad.norm()) for name, p in model.named_parameters() if "weight" in name and p.grad is not None]
    assert min(norms) > 1e-3 * max(norms)


def test_the_scheme_follows_from_the_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    words = [str(change) for change in initialize(model)]

    assert words == ["0: kaiming for ReLU", "2: xavier for Tanh", "4: xavier"]


def test_recurrent_weights_become_orthogonal_and_forget_gates_open() -> None:
    model = nn.LSTM(3, 4)

    initialize(model)

    state = model.state_dict()
    gate = state["weight_hh_l0"][:4]
    torch.testing.assert_close(gate @ gate.T, torch.eye(4), atol=1e-5, rtol=0)
    assert state["bias_ih_l0"][4:8].tolist() == [1.0] * 4


def test_lsuv_gives_each_layer_unit_variance() -> None:
    model, batch = chain(nn.Tanh, depth=4, width=32), 10 * torch.randn(64, 2)

    initialize(model, "lsuv", batch=batch)

    assert float(model[0](batch).detach().square().mean().sqrt()) == pytest.approx(1.0, abs=0.01)


def test_only_the_named_layers_change() -> None:
    model = chain(nn.ReLU)
    before = model.state_dict()["2.weight"].clone()

    initialize(model, layers=["0"])

    assert torch.equal(model.state_dict()["2.weight"], before)


def test_fitting_leaves_random_numbers_and_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1))
    statistics = model.state_dict()["1.running_mean"].clone()
    initialize(model)
    state = torch.get_rng_state()

    fill(model, "auto", layers=[], forward=lambda: model(torch.ones(16, 4)))

    assert torch.equal(model.state_dict()["1.running_mean"], statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_replacing_an_activation_keeps_weights_and_the_output() -> None:
    model = chain(nn.Sigmoid, depth=3)
    names = set(model.state_dict())

    changes = replace_activation(model, "Sigmoid", nn.ReLU)

    assert [type(m).__name__ for m in model if not isinstance(m, nn.Linear)] == ["ReLU", "ReLU", "ReLU", "Sigmoid"]
    assert (len(changes), set(model.state_dict())) == (3, names)


@pytest.mark.parametrize("kind", ["layer", "batch", "group"])
def test_a_norm_goes_in_front_of_activations_and_old_names_stay(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    names, optimizer = set(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    insert_norm(model, kind, optimizer=optimizer)

    assert names < set(model.state_dict())
    assert model(torch.randn(5, 1, 4, 4)).shape == (5, 2)
    assert (len(optimizer.param_groups[1]["params"]), optimizer.param_groups[1]["momentum"]) == (4, 0.9)


@pytest.mark.parametrize(
    ("output", "mended"), [(nn.Softmax(1), "Sigmoid"), (nn.ReLU(), "Softplus"), (nn.Sigmoid(), None)]
)
def test_an_output_that_lets_no_gradient_through_is_mended(output: nn.Module, mended: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 1), output)

    changes = mend_output(model)

    assert type(model[1]).__name__ == (mended or type(output).__name__)
    assert bool(changes) == bool(mended)


NOT_A_KIND: Any = 3


def compiled(model: nn.Module) -> Any:
    return torch.compile(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda m: initialize(m, "he"), UnknownNameError, "unknown scheme 'he'"),
        (lambda m: initialize(m, "data"), ConfigurationError, "scheme 'data' needs a 'batch' of inputs"),
        (lambda m: initialize(m, layers=["fc"]), UnknownNameError, "unknown layer 'fc'"),
        (lambda m: initialize(m, layers=["1"]), ConfigurationError, r"layer '1' \(ReLU\) cannot be initialised"),
        (
            lambda m: replace_activation(m, "Tanh", "ReLU"),
            ConfigurationError,
            "no hidden activation module of kind Tanh",
        ),
        (lambda m: replace_activation(m, "ReLU", "Relu"), UnknownNameError, "unknown activation 'Relu'"),
        (
            lambda m: replace_activation(m, NOT_A_KIND, "ReLU"),
            ConfigurationError,
            "'old' must be a class of torch modules",
        ),
        (lambda m: insert_norm(m, "spectral"), UnknownNameError, "unknown kind of normalisation 'spectral'"),
        (lambda m: insert_norm(nn.Linear(2, 2)), ConfigurationError, "no hidden layer of Linear"),
        (lambda m: insert_norm(compiled(m)), ConfigurationError, "compiled: apply it to the model before"),
    ],
)
def test_what_cannot_be_done_safely_is_refused(act: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        act(chain(nn.ReLU) if "Tanh" in words else nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
