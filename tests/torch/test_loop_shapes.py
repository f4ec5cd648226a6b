"""What is recorded in every shape of training loop, held against a float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine, replay
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.reader import RunReader
from gradwatch.records import NOT_MEASURED
from tests.torch.loops import assert_norms, data, mlp, mse, reference, watching


def test_a_plain_loop(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(20):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert record.stages == [0] * 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_that_load_batches_add_nothing(run_dir: Path, method: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loading: dict[str, Any] = {"batch_size": None, "num_workers": 1, "multiprocessing_context": method}
    batches: Any = torch.utils.data.DataLoader(list(data(6)), **loading)  # type: ignore[arg-type]  # a list is a dataset
    with watch_torch(model, optimizer, run_dir=run_dir):
        for x, y in batches:
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
    run = RunReader(run_dir)
    assert run.grad_norms().index.tolist() == list(range(6))
    assert run.info.status == "finished"


def test_accumulation_gives_one_row_per_step_with_the_accumulated_gradient(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(24)):
            mse(model, x, y).backward()
            if i % 3 == 2:
                expected.append(reference(model.parameters()))
                optimizer.step()
                optimizer.zero_grad()
    assert_norms(record.norms, expected)


def test_gradients_averaged_by_hand_before_the_step_are_clipped_as_clip_grad_norm_says(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    returned = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(24)):
            mse(model, x, y).backward()
            if i % 3 == 2:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.div_(3)
                returned.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
                optimizer.step()
                optimizer.zero_grad()
    np.testing.assert_allclose(record.metric("global_norm"), returned, rtol=1e-6)


def test_parameters_without_gradient_are_not_measured(run_dir: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 4), "unused": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(3):
            optimizer.zero_grad()
            mse(model["used"], x, y).backward()
            optimizer.step()
    assert (record.norms[:, :2] > 0).all()
    assert (record.norms[:, 2:] == NOT_MEASURED).all()


def test_a_frozen_parameter_is_measured_from_the_step_it_is_unfrozen(run_dir: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(8)):
            if i == 4:
                model[0].requires_grad_(True)
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert [p.trainable for p in record.batches[-1].parameters] == [False, False, True, True, True, True]


def test_a_replay_does_not_miss_the_gradients_of_what_was_frozen_at_first(run_dir: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch_torch(model, optimizer, run_dir=run_dir) as watcher:
        for i, (x, y) in enumerate(data(60)):
            model[0].requires_grad_(i >= 50)
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
    run = RunReader(run_dir)
    found = replay(run.batches(), Engine("default", RunContext(run.info.parameters)))
    assert "unused" not in {finding.rule for finding in [*found, *watcher.findings]}


def test_a_parameter_group_added_later_becomes_new_columns(run_dir: Path) -> None:
    model, head = mlp(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(8)):
            if i == 4:
                optimizer.add_param_group({"params": head.parameters(), "lr": 0.01})
            optimizer.zero_grad()
            head.zero_grad()
            (head(model(x)) - y).square().mean().backward()
            expected.append(reference([*model.parameters(), *head.parameters()]))
            optimizer.step()
    for row in expected[:4]:
        row[6:] = [NOT_MEASURED, NOT_MEASURED]
    assert_norms(record.norms, expected)
    assert record.names[6:] == ["added.6", "added.7"]


def test_tied_weights_are_one_column_with_aliases(run_dir: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Any:
            return self.head(self.embed(tokens))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randint(10, (5,))).square().mean().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert record.names == ["embed.weight"]
    assert record.batches[-1].parameters[0].aliases == ("head.weight",)


def _gan(run_dir: Path, *, critic: int, steps: int) -> tuple[Any, list[list[float]]]:
    torch.manual_seed(0)
    parts = nn.ModuleDict({"g": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), "d": nn.Linear(8, 1)})
    of_g, of_d = (torch.optim.SGD(parts[name].parameters(), lr=0.1) for name in "gd")
    expected = []
    with watching(run_dir, parts, [of_g, of_d]) as (watcher, record):
        for i in range(steps):
            row = [NOT_MEASURED] * 4
            fake = parts["g"](torch.randn(6, 4))
            of_d.zero_grad()
            loss = parts["d"](fake.detach()).mean() - parts["d"](torch.randn(6, 8)).mean()
            loss.backward()
            last = reference(parts["d"].parameters())
            of_d.step()
            watcher.log(d_loss=loss)
            if i % critic == critic - 1:
                of_g.zero_grad()
                loss = -parts["d"](fake).mean()
                loss.backward()
                row = reference(parts["g"].parameters())
                watcher.log(g_loss=loss)
                of_g.step()
            expected.append(row + last)
    return record, expected


def test_the_two_optimizers_of_a_gan_share_a_row(run_dir: Path) -> None:
    record, expected = _gan(run_dir, critic=1, steps=8)
    assert_norms(record.norms, expected)
    assert np.isfinite(record.metric("g_loss")).all()


def test_a_critic_that_steps_more_often_has_rows_of_its_own(run_dir: Path) -> None:
    record, expected = _gan(run_dir, critic=3, steps=12)
    assert_norms(record.norms, expected)
    assert np.isfinite(record.metric("g_loss")).tolist() == [i % 3 == 2 for i in range(12)]


def test_each_parameter_group_has_its_learning_rate_recorded(run_dir: Path) -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2:].parameters(), "lr": torch.tensor(0.5)}]
    optimizer = torch.optim.SGD(groups)
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(3):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    np.testing.assert_allclose(record.metric("lr"), [0.1, 0.05, 0.025])
    np.testing.assert_allclose(record.metric("lr.0.1"), [0.5] * 3)


def test_groups_in_another_order_than_the_model_keep_their_columns(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[4].parameters()}, {"params": model[:3].parameters()}], lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(5):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_lbfgs_records_the_first_evaluation_of_each_step(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    expected: list[list[float]] = []
    losses: list[float] = []
    with watching(run_dir, model, optimizer) as (watcher, record):
        for x, y in data(5):
            first = True

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal first
                optimizer.zero_grad()
                loss = mse(model, x, y)
                loss.backward()
                if first:
                    expected.append(reference(model.parameters()))
                    losses.append(loss.item())
                first = False
                return loss

            loss = optimizer.step(closure)
            watcher.log(loss=loss)
    assert_norms(record.norms, expected)
    np.testing.assert_allclose(record.metric("loss"), losses, rtol=1e-6)


def test_sgd_with_a_closure(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: list[list[float]] = []
    with watching(run_dir, model, optimizer) as (watcher, record):
        for x, y in data(5):

            def closure(x: Tensor = x, y: Tensor = y) -> float:
                optimizer.zero_grad()
                loss = mse(model, x, y)
                loss.backward()
                watcher.log(loss=loss)
                expected.append(reference(model.parameters()))
                return loss.item()

            optimizer.step(closure)
    assert_norms(record.norms, expected)
    assert np.isfinite(record.metric("loss")).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_embeddings_count_the_sum_of_repeated_tokens(run_dir: Path, sparse: bool) -> None:
    model = nn.Embedding(10, 4, sparse=sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 3])).square().sum().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_complex_parameters(run_dir: Path) -> None:
    model = nn.Linear(8, 4, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, _y in data(12):
            optimizer.zero_grad()
            model(x.to(torch.complex64)).abs().square().mean().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_accumulated_without_loss(run_dir: Path, dtype: torch.dtype) -> None:
    model = mlp(width=64).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(12):
            optimizer.zero_grad()
            mse(model, x.to(dtype), y.to(dtype)).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_half_precision_norms_do_not_overflow(run_dir: Path) -> None:
    model = nn.Linear(256, 256, bias=False, dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(run_dir, model, optimizer) as (_, record):
        model.weight.grad = torch.full_like(model.weight, 300.0)
        optimizer.step()
    assert record.norms[0, 0] == pytest.approx(256 * 300, rel=1e-6)


def test_passes_in_evaluation_and_without_grad_leave_no_trace(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(6):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
            model.eval()
            with torch.no_grad():
                mse(model, x, y)
            with torch.inference_mode():
                mse(model, x, y)
            model.train()
    assert_norms(record.norms, expected)


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=7),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_learning_rate_recorded_is_the_one_the_step_used(run_dir: Path, name: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(6):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    np.testing.assert_allclose(record.metric("lr"), used)


def test_optimizers_that_step_in_backward_are_measured_before_their_gradients_are_freed(run_dir: Path) -> None:
    model = mlp()
    expected: dict[int, list[float]] = {}
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: Any) -> None:
        expected.setdefault(id(parameter), []).extend(reference([parameter]))
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    with watching(run_dir, model, list(optimizers.values())) as (watcher, record):
        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        for i, (x, y) in enumerate(data(6)):
            mse(model, x, y).backward()
            watcher.log(index=i)
        for handle in handles:
            handle.remove()
    assert_norms(record.norms, np.transpose([expected[id(p)] for p in model.parameters()]))
    assert record.metric("index").tolist() == list(range(6))
    assert record.stages == [0] * 6


def test_in_place_modules_work(run_dir: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.Hardtanh(inplace=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(4):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
    assert (record.norms > 0).all()


def test_a_gradient_penalty_is_part_of_the_gradient_and_no_pass_of_its_own(run_dir: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, _y in data(5):
            optimizer.zero_grad()
            inputs = x.clone().requires_grad_()
            out = model(inputs)
            (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
            (out.mean() + (slope.norm(dim=1) - 1).square().mean()).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_two_backward_passes_per_step_record_their_sum(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(5):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            loss.backward(retain_graph=True)
            loss.backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_passes_that_reach_other_parts_of_the_model_in_turn(run_dir: Path) -> None:
    trunk, heads = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])
    alone = nn.Linear(8, 4)
    model = nn.ModuleDict({"trunk": trunk, "heads": heads, "alone": alone})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(24)):
            optimizer.zero_grad()
            out = alone(x) if i % 5 == 4 else heads[i % 3](trunk(x))
            (out - y).square().mean().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_a_backward_pass_that_raises_midway_does_not_hide_the_next_step(run_dir: Path) -> None:
    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("boom")

    bomb: Any = Bomb.apply
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(8)):
            optimizer.zero_grad()
            if i in (0, 4):
                hidden = model[:3](x)
                with pytest.raises(RuntimeError, match="boom"):
                    (model[3:](bomb(hidden)) - y).square().mean().backward()
                optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert record.stages == [0] * 8


def test_several_watchers_record_one_model_each_by_itself(run_dir: Path, tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        watching(run_dir, model, optimizer) as (_, one),
        watching(tmp_path / "other", model, optimizer) as (_, other),
    ):
        for x, y in data(4):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert_norms(one.norms, other.norms)
    assert (one.metric("clip_coefficient") < 1).all()
    np.testing.assert_array_equal(one.metric("clip_coefficient"), other.metric("clip_coefficient"))


def test_without_an_optimizer_given_every_optimizer_of_the_model_is_watched(run_dir: Path) -> None:
    model, foreign = mlp(), nn.Linear(8, 4)
    of_foreign = torch.optim.SGD(foreign.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model) as (_, record):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for x, y in data(6):
            of_foreign.zero_grad()
            mse(foreign, x, y).backward()
            of_foreign.step()
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_an_optimizer_whose_step_calls_that_of_its_base_class_steps_once(run_dir: Path) -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # so that torch has wrapped the step of the base class
    model = mlp()
    optimizer = Mine(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(5):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


def test_the_step_after_one_that_raised_is_recorded(run_dir: Path) -> None:
    class Flaky(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = mlp()
    optimizer = Flaky(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(6)):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.fails = i == 2
            if optimizer.fails:
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
            else:
                optimizer.step()
    assert len(record) == 6


def test_wrappers_around_an_optimizer_are_looked_through(run_dir: Path) -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, Wrapper(optimizer)) as (_, record):
        mse(model, *data(1)[0]).backward()
        optimizer.step()
    assert len(record) == 1


def test_tiny_and_huge_gradients_are_neither_lost_nor_infinite(run_dir: Path) -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(run_dir, model, optimizer) as (_, record):
        for _ in range(3):
            for layer, size in zip(model, (1e-30, 1e30, 0.0), strict=True):
                layer.weight.grad = torch.full((4, 4), size)
            optimizer.step()
    np.testing.assert_allclose(record.norms, [[4e-30, 4e30, 0.0]] * 3, rtol=1e-6)


def test_statistics_are_sampled_every_few_steps_and_exact(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: dict[str, dict[int, Any]] = {"grad_max": {}, "zero_fraction": {}, "weight_norm": {}, "update_ratio": {}}
    with watching(run_dir, model, optimizer, stats_every=3) as (_, record):
        for i, (x, y) in enumerate(data(7)):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            expected["grad_max"][i] = [g.abs().max().item() for g in grads]
            expected["zero_fraction"][i] = [(g == 0).double().mean().item() for g in grads]
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            before = [p.detach().double() for p in model.parameters()]
            optimizer.step()
            after = [p.detach().double() for p in model.parameters()]
            expected["weight_norm"][i] = [w.norm().item() for w in after]
            expected["update_ratio"][i] = [
                ((b - a).norm() / a.norm()).item() for a, b in zip(after, before, strict=True)
            ]
    for name, rows in expected.items():
        found = record.samples(name)
        assert sorted(found) == [0, 3, 6], name
        for step, row in found.items():
            np.testing.assert_allclose(row, rows[step], rtol=1e-4, atol=1e-9, err_msg=f"{name} at {step}")


def test_the_elements_that_are_not_finite_are_counted_at_the_step_it_happens_before_clipping_spreads_them(
    run_dir: Path,
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(run_dir, model, optimizer, stats_every=100) as (_, record):
        for i, (x, y) in enumerate(data(3)):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            if i == 2:
                loss = loss + list(model.parameters())[-1][1] * float("nan")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    counts = record.samples("nonfinite_count")
    assert sorted(counts) == [0, 2]
    assert counts[2].tolist() == [0, 0, 0, 0, 0, 1]
