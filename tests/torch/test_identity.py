"""Law 1: watching without actions leaves the training bit-identical, over 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.torch.loops import Recorder, assert_same, data, mlp, mse, state_of, watching

STEPS = 50
Watch = Callable[..., Recorder | None]


def both(run_dir: Path, loop: Callable[[Watch], list[Any]]) -> Recorder:
    """Run the loop unwatched and watched and compare what is left; returns what was recorded."""

    def nobody(*_: Any, **__: Any) -> None:
        return None

    torch.manual_seed(0)
    plain = loop(nobody)
    recorders = []
    with ExitStack() as stack:

        def watch(model: nn.Module, *optimizers: Any, **settings: Any) -> Recorder:
            _, recorder = stack.enter_context(
                watching(run_dir, model, list(optimizers), detectors="default", **settings)
            )
            recorders.append(recorder)
            return recorder

        torch.manual_seed(0)
        watched = loop(watch)
    assert_same(plain, watched)
    return recorders[0]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_ends_where_it_ends_unwatched(run_dir: Path, name: str) -> None:
    def loop(watch: Watch) -> list[Any]:
        model = mlp()
        optimizer = OPTIMIZERS[name](model.parameters())
        watch(model, optimizer)
        for x, y in data(STEPS):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_lbfgs_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
        watch(model, optimizer)
        for x, y in data(STEPS):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = mse(model, x, y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_a_cnn_with_dropout_and_batch_norm_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Conv2d(4, 4, 3),
            nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        watch(model, optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.randint(4, (4,))).backward()
            optimizer.step()
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_an_lstm_with_clipping_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        torch.manual_seed(0)
        model = nn.LSTM(8, 12, num_layers=2, dropout=0.2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        watch(model, optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(6, 4, 8))[0].square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_a_transformer_with_a_scheduler_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
        watch(model, optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(2, 5, 16)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        return [*state_of(model, optimizer), scheduler.get_last_lr()]

    assert len(both(run_dir, loop)) == STEPS


def test_a_gan_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        torch.manual_seed(0)
        parts = nn.ModuleDict({"g": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), "d": nn.Linear(8, 1)})
        of_g, of_d = (torch.optim.Adam(parts[name].parameters(), lr=1e-2) for name in "gd")
        watch(parts, of_g, of_d)
        for _ in range(STEPS):
            fake = parts["g"](torch.randn(6, 4))
            of_d.zero_grad()
            (parts["d"](fake.detach()).mean() - parts["d"](torch.randn(6, 8)).mean()).backward()
            of_d.step()
            of_g.zero_grad()
            (-parts["d"](fake).mean()).backward()
            of_g.step()
        return state_of(parts, of_g, of_d)

    assert len(both(run_dir, loop)) == STEPS


def test_bf16_autocast_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        model = mlp(inplace=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        watch(model, optimizer)
        for x, y in data(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = mse(model, x, y)
            loss.backward()
            optimizer.step()
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_accumulation_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch(model, optimizer)
        for i, (x, y) in enumerate(data(STEPS * 4)):
            (mse(model, x, y) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        return state_of(model, optimizer)

    assert len(both(run_dir, loop)) == STEPS


def test_a_grad_scaler_ends_where_it_ends_unwatched(run_dir: Path) -> None:
    def loop(watch: Watch) -> list[Any]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
        watch(model, optimizer)
        for i, (x, y) in enumerate(data(STEPS)):
            optimizer.zero_grad()
            scaler.scale(mse(model, x * (float("inf") if i == 20 else 1.0), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return [*state_of(model, optimizer), scaler.state_dict()]

    assert len(both(run_dir, loop)) == STEPS
