"""The published cases: from a specification in `benchmarks/cases` to a training and the verdict on its run."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework import data, fingerprint, losses, networks
from benchmarks.casework.case import Case, Losses, Outcome, Training
from benchmarks.casework.networks import CharacterModel, sequential
from benchmarks.casework.outcome import judge

DIRECTORY = Path(__file__).resolve().parent.parent / "cases"
#: What a run depends on; the rest of a specification is provenance and verdicts.
TRAINED_FIELDS = ("data", "layers", "loss", "opt", "batch", "epochs", "max_steps", "lr_range_test")
CONTEXT = 64

Spec = Mapping[str, Any]
Batches = Iterator[tuple[Tensor, Tensor]]


def published_cases(directory: Path = DIRECTORY) -> list[Case]:
    """All specifications of a directory, by id."""
    return [case_of(json.loads(path.read_text())) for path in sorted(directory.glob("*.json"))]


def case_of(spec: Spec) -> Case:
    """A specification as a case."""
    label = spec["label"]
    trained = {name: spec[name] for name in TRAINED_FIELDS if name in spec}
    return Case(
        id=spec["id"],
        suite="cases",
        tier=spec["tier"],
        classes=(label["class"], *label.get("also_accept", ())),
        build=functools.partial(build, spec),
        judge=functools.partial(_judge, spec),
        fingerprint=json.dumps([trained, _code()], sort_keys=True),
        cost=_cost(spec),
        spec=spec,
    )


@functools.cache
def _code() -> str:
    return fingerprint.of_modules(data, losses, networks, sys.modules[__name__])


def build(spec: Spec, seed: int) -> Training:
    """The training of `spec` with `seed`; draws random numbers in the order of the runs that gave `observed`."""
    torch.manual_seed(seed)
    return _language_model(spec) if spec["loss"] == "lm" else _supervised(spec, seed)


def _supervised(spec: Spec, seed: int) -> Training:
    arrays = data.load(spec["data"], seed)
    x, y = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    model, penalised = sequential(spec["layers"], x.shape[1:])
    count, size = len(x), min(spec["batch"], len(x))
    per_epoch = max(1, math.ceil(count / size))
    batches = _epochs(x, x if spec["loss"] == "vae" else y, size)
    loss_of = losses.LOSSES[spec["loss"]]

    def loss() -> tuple[Tensor, Tensor]:
        inputs, targets = next(batches)
        value = loss_of(model(inputs), targets, count)
        return value, value + sum(factor * weight.square().sum() for weight, factor in penalised)

    def metric() -> float:
        with torch.no_grad():
            found = losses.accuracy(spec["loss"], model(x), y)
        return math.nan if found is None else found

    steps = min(spec["max_steps"], spec["epochs"] * per_epoch)
    return _training(spec, model, loss, steps=steps, metric=metric if spec["loss"] != "vae" else None)


def _epochs(x: Tensor, y: Tensor, size: int) -> Batches:
    while True:
        order = torch.randperm(len(x))
        for start in range(0, len(x), size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]


def _language_model(spec: Spec) -> Training:
    text = torch.tensor(data.shakespeare())
    layer = spec["layers"][0]
    model = CharacterModel(
        int(text.max()) + 1,
        width=layer["n_embd"],
        heads=layer["n_head"],
        layers=layer["n_layer"],
        context=layer["block"],
    )

    def loss() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - CONTEXT - 1, (spec["batch"],))
        window = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        value = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        return value, value

    return _training(spec, model, loss, steps=spec["max_steps"])


def _training(
    spec: Spec,
    model: nn.Module,
    loss: Callable[[], tuple[Tensor, Tensor]],
    *,
    steps: int,
    metric: Callable[[], float] | None = None,
) -> Training:
    options = spec["opt"]
    optimizer = _optimizer(options, list(model.parameters()))
    rate = _learning_rate(options)

    def step(k: int) -> Tensor:
        value, penalised = loss()
        optimizer.zero_grad()
        penalised.backward()
        if options.get("clip"):
            nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        for group in optimizer.param_groups:
            group["lr"] = rate(k)
        optimizer.step()
        return value.detach()

    return Training(model, optimizer, step, steps, metric)


def _optimizer(options: Spec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer with Keras' defaults, of which epsilon differs from PyTorch's."""
    rate = options["lr"]
    match options["name"]:
        case "sgd":
            momentum, nesterov = options.get("momentum", 0), options.get("nesterov", False)
            return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=nesterov)
        case "adam":
            betas = (options.get("b1", 0.9), options.get("b2", 0.999))
            return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=options.get("eps", 1e-7))
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=rate, alpha=options.get("rho", 0.9), eps=1e-7)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate, initial_accumulator_value=0.1, eps=1e-7)
        case "adadelta":
            return torch.optim.Adadelta(parameters, lr=rate)
    raise ValueError(f"unknown optimizer: {options['name']!r}")


def _learning_rate(options: Spec) -> Callable[[int], float]:
    """Step to learning rate: constant, or as `decay`, `schedule` and `warmup` say."""
    rate: float = options["lr"]
    if options.get("warmup"):
        return lambda k: rate * min(1.0, (k + 1) / options["warmup"])
    if options.get("schedule") == "exp":
        ratio, last = options["lr_end"] / rate, max(1, options["num_it"] - 1)
        return lambda k: float(rate * ratio ** (k / last))
    return lambda k: rate / (1 + options.get("decay", 0) * k)


def _judge(spec: Spec, run: Losses, seed: int) -> Outcome:
    constant = None
    if spec["loss"] not in ("lm", "vae"):
        constant = losses.constant_loss(spec["loss"], data.load(spec["data"], seed)[1], spec["batch"])
    return judge(run, constant=constant, tiny_batch=spec["batch"] <= 4, range_test=spec.get("lr_range_test", False))


def _cost(spec: Spec) -> float:
    """Seconds a run takes, roughly: steps times what a layer of each type costs."""
    images = "shape" in spec["data"] or spec["data"]["name"] == "mnist5k"
    weight = {"conv": 8e-3, "rnn": 6e-2, "vae": 5e-3, "gpt": 0.1, "dense": 4e-4 if images else 1.5e-4}
    per_step = 5e-4 + sum(weight.get(layer["t"], 5e-5) for layer in spec["layers"])
    return float(spec["max_steps"]) * per_step
