from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch as gw
from gradwatch.actions import Action, DecayLR, Reinitialize, ResetOptimizerState, Restructure, Rollback, SkipStep, Stop
from gradwatch.backends.torch_snapshots import Snapshots
from gradwatch.detectors.engine import Engine, replay
from gradwatch.errors import ConfigurationError


def sigmoids() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for _ in range(11) for module in (nn.Linear(5, 5), nn.Sigmoid())]
    return nn.Sequential(nn.Linear(2, 5), nn.Sigmoid(), *layers, nn.Linear(5, 1), nn.Sigmoid())


def rings(n: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    angle, outer = torch.rand(n, generator=generator) * 6.28, torch.arange(n) % 2
    radius = 0.5 + 0.5 * outer
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), outer[:, None].float()


def train(
    model: nn.Module,
    actions: Any,
    run_dir: Path,
    *,
    steps: int,
    lr: float = 1e-3,
    poison: int | None = None,
    dry_run: bool = False,
) -> tuple[Any, list[float]]:
    x, y = rings()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    with gw.watch(model, optimizer, run_dir=run_dir, actions=actions, dry_run=dry_run) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            (loss * torch.nan if step == poison else loss).backward()
            optimizer.step()
            watcher.log(loss=loss)
            losses.append(float(loss.detach()))
    assert watcher.faults.messages == {}
    return watcher, losses


def recorded(run_dir: Path) -> list[tuple[str, str, str]]:
    table = gw.load(run_dir).actions()
    return list(zip(*(map(str, table[name]) for name in ("action", "reason", "outcome")), strict=True))


def test_a_vanishing_network_learns_once_it_is_initialised_again(run_dir: Path) -> None:
    _, losses = train(sigmoids(), [Reinitialize()], run_dir, steps=600)

    assert recorded(run_dir)[0] == ("Reinitialize", "vanishing", "helped")
    assert losses[-1] < 0.2 < losses[20]


def test_findings_after_a_remedy_are_those_of_a_replay(run_dir: Path) -> None:
    watcher, _ = train(sigmoids(), [Reinitialize()], run_dir, steps=150)
    run = gw.load(run_dir)
    engine = Engine.from_config(run.info.config["detectors"], watcher._context())

    assert {f.id: f for f in replay(run.batches(), engine)} == {f.id: f for f in watcher.findings}


def test_new_parameters_of_a_changed_network_join_optimizer_and_record(run_dir: Path) -> None:
    model = sigmoids()

    watcher, losses = train(model, [Restructure(changes=("norm",))], run_dir, steps=200)

    assert isinstance(model[1], nn.Sequential)
    assert len(watcher._parameters) > 26
    assert losses[-1] < losses[0]


def test_the_same_run_takes_the_same_actions(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        _, losses = train(sigmoids(), "repair", tmp_path / name, steps=200)
        found.append((recorded(tmp_path / name), losses))

    assert found[0] == found[1]


def test_rollback_restores_the_state_before_the_fall_and_goes_on(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())

    _, losses = train(model, [Rollback(every=20, factor=1.0)], run_dir, steps=300, lr=0.01, poison=150)

    assert recorded(run_dir)[0] == ("Rollback", "nonfinite", "helped")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert losses[-1] < losses[140]


def test_stop_leaves_the_loop_and_the_record_says_why(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

    with pytest.raises(gw.StopTraining, match="training stopped"):
        train(model, [Stop(on="nonfinite", confirm=0)], run_dir, steps=50, poison=10)

    assert recorded(run_dir)[0][:2] == ("Stop", "nonfinite")


def test_a_skipped_step_leaves_the_state_of_a_run_without_it(tmp_path: Path) -> None:
    def state(name: str, *, poison: int | None, leave_out: int | None) -> tuple[Any, Any]:
        model, (x, y) = sigmoids(), rings()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with gw.watch(model, optimizer, run_dir=tmp_path / name, actions=[SkipStep()]):
            for step in range(20):
                if step != leave_out:
                    optimizer.zero_grad()
                    loss = nn.functional.binary_cross_entropy(model(x), y)
                    (loss * torch.inf if step == poison else loss).backward()
                    optimizer.step()
        return model.state_dict(), optimizer.state_dict()["state"]

    torch.testing.assert_close(
        state("poisoned", poison=7, leave_out=None), state("without", poison=None, leave_out=7), rtol=0, atol=0
    )


def test_a_dry_run_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    plain = train(sigmoids(), (), tmp_path / "plain", steps=60)[1]

    losses = train(sigmoids(), "repair", tmp_path / "dry", steps=60, dry_run=True)[1]

    assert losses == plain
    told = [json.loads(line) for line in (tmp_path / "dry" / "events.jsonl").read_text().splitlines()]
    assert {event["dry_run"] for event in told if event.get("action")} == {True}


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_snapshot_brings_back_every_number(where: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()

    step()
    snapshots = Snapshots(model, [optimizer], keep=2, directory=tmp_path if where == "disk" else None)
    snapshots.take(1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step()
    snapshots.take(2)
    step()

    assert snapshots.restore(1) == 1
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    snapshots.close()
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_an_optimizer_that_never_stepped_clears_its_state() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    snapshots = Snapshots(model, [optimizer], keep=1)
    snapshots.take(0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()

    snapshots.restore(5)

    assert optimizer.state == {}


def test_optimizer_state_is_cleared(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

    train(model, [ResetOptimizerState(on="nonfinite"), SkipStep()], run_dir, steps=30, poison=12)

    detail = gw.load(run_dir).actions()["detail"].tolist()
    assert detail == ["optimizer state of all layers cleared because of nonfinite: state of 4 parameters"]


def test_a_watched_model_can_be_pickled_while_a_remedy_waits_for_its_batch(run_dir: Path) -> None:
    model, (x, y) = sigmoids(), rings()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gw.watch(model, optimizer, run_dir=run_dir, actions=[Reinitialize()]) as watcher:
        for _ in range(60):
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 -- our own bytes
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss)

    assert copied(x).shape == (256, 1)
    assert recorded(run_dir)[0][0] == "Reinitialize"
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize(
    ("actions", "model", "words"),
    [
        (lambda: [DecayLR(on="explodes")], nn.Linear(2, 1), "unknown rule 'explodes'; did you mean 'exploding'"),
        (lambda: [DecayLR(factor=1.5)], nn.Linear(2, 1), "'factor' must be < 1: 1.5"),
        ([Reinitialize()], nn.BatchNorm1d(2), "Reinitialize.* finds no linear, convolutional or recurrent layer"),
        ([Rollback(keep=10**9)], nn.Linear(2, 1), "Rollback.* needs .* of memory and .* are free"),
        ([Rollback(keep=10**12, where="disk")], nn.Linear(2, 1), "Rollback.* needs .* of disk"),
        ([Restructure()], torch.compile, "Restructure cannot change this model, which is compiled"),
        ("repare", nn.Linear(2, 1), "unknown preset of actions 'repare'"),
        (Stop(), nn.Linear(2, 1), "'actions' must be a list of gradwatch actions or the name of a preset: Stop"),
    ],
)
def test_misuse_is_refused_by_watch(actions: Any, model: Any, words: str, run_dir: Path) -> None:
    model = model if isinstance(model, nn.Module) else model(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ConfigurationError, match=words):
        gw.watch(model, optimizer, run_dir=run_dir, actions=actions() if callable(actions) else actions)

    gw.watch(model, optimizer, run_dir=run_dir).close()  # nothing is left in the way of the next try


def test_what_no_remedy_takes_away_ends_the_run_with_its_cause(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softmax(dim=1))

    with pytest.raises(gw.StopTraining, match="Every gradient is exactly zero"):
        train(model, "repair", run_dir, steps=300)

    run = gw.load(run_dir)
    assert run.actions()["action"].tolist() == ["Reinitialize", "Reinitialize", "Stop"]
    assert "softmax" in run.findings()["cause"].iloc[-1]


@pytest.mark.parametrize(("free", "level"), [(10**12, "INFO"), (10**4, "WARNING")])
def test_a_rollback_says_what_it_costs_before_it_starts(
    free: int, level: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gradwatch.backends.room._free_memory", lambda: free)
    model = nn.Linear(100, 1)
    with caplog.at_level("INFO", "gradwatch"):
        gw.watch(model, torch.optim.Adam(model.parameters()), run_dir=run_dir, actions=[Rollback(keep=2)]).close()

    assert "room for 2 snapshots of the weights: up to 2.42 kB of memory" in caplog.text
    assert level in caplog.text


def test_weights_that_cannot_be_kept_are_not_given_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.backends.room._free_memory", lambda: 10)

    train(sigmoids(), [Reinitialize()], run_dir, steps=60)

    assert recorded(run_dir)[0][2].startswith("failed: the weights could not be kept meanwhile")


def test_the_record_keeps_the_outcome_under_the_id_of_the_action(run_dir: Path) -> None:
    actions: list[Action] = [DecayLR(on="nonfinite"), SkipStep()]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    train(model, actions, run_dir, steps=60, poison=12)

    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]

    told = [line for line in lines if "DecayLR" in json.dumps(line) and "finding" in json.dumps(line)]
    assert len({json.dumps(line.get("id") or line.get("data", {}).get("id")) for line in told}) == 1
    assert recorded(run_dir) == [("DecayLR", "nonfinite", "helped")]
