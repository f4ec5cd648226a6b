from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.heal import Candidate, Fork, Healing, _fields, heal


class DeepSigmoids:
    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [module for _ in range(10) for module in (nn.Linear(5, 5), nn.Sigmoid())]
        self.model = nn.Sequential(nn.Linear(2, 5), nn.Sigmoid(), *layers, nn.Linear(5, 1), nn.Sigmoid())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.x = torch.randn(64, 2)
        self.y = (self.x[:, :1] > 0).float()

    def step(self, k: int) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def healed() -> Healing:
    return heal(DeepSigmoids, budget_steps=600, progress=False)


@pytest.fixture(scope="module")
def healing() -> Healing:
    """Only to look at."""
    return healed()


def test_the_best_remedy_learns_where_the_sick_run_does_not(healing: Healing) -> None:
    losses = {fork.candidate.name: fork.loss for fork in healing.forks}
    assert (healing.best.loss < 0.15, losses["none"] > 0.2) == (True, True)
    assert healing.steps <= 600


def test_the_same_search_ends_the_same(healing: Healing) -> None:
    assert [fork.losses for fork in healed().forks] == [fork.losses for fork in healing.forks]


def test_a_fork_draws_what_it_would_draw_alone() -> None:
    class Shuffled(DeepSigmoids):
        def step(self, k: int) -> Tensor:
            self.x, self.y = (part[torch.randperm(64)[:16]] for part in (self.data, self.targets))
            return super().step(k)

        def __init__(self) -> None:
            super().__init__()
            self.data, self.targets = self.x, self.y

    state = torch.get_rng_state()
    alone = Fork(Candidate("none"), Shuffled())
    alone.run(60)

    healing = heal(Shuffled, budget_steps=400, progress=False)

    raced = next(fork for fork in healing.forks if fork.candidate.name == "none")
    assert raced.losses == alone.losses[: raced.steps] != []
    torch.set_rng_state(state)


def test_the_best_goes_on_where_its_fork_ended() -> None:
    best = healed().best
    steps, loss = best.steps, best.loss

    best.run(100)

    assert (best.steps, best.loss < loss) == (steps + 100, True)


def test_what_detectors_know_goes_on_from_round_to_round() -> None:
    whole, parts = (Fork(Candidate("none"), DeepSigmoids()) for _ in range(2))

    whole.run(40)
    for _ in range(10):
        parts.run(4)

    assert {finding.id for finding in parts.findings} == {finding.id for finding in whole.findings} != set()
    assert parts.sickness == whole.sickness == 1


@pytest.mark.parametrize(
    ("count", "budget", "fields"), [(11, 900, [11, 5, 2]), (11, 70, [11, 2]), (11, 60, [11]), (1, 50, [1]), (0, 9, [])]
)
def test_the_last_round_is_a_race_of_two_and_no_round_is_too_short(count: int, budget: int, fields: list[int]) -> None:
    assert _fields(count, budget) == fields


def test_the_rate_of_the_best_stays_when_it_goes_on_under_repair() -> None:
    training = DeepSigmoids()
    training.model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    training.optimizer = torch.optim.Adam(training.model.parameters(), lr=3e-3)
    fork = Fork(Candidate("less", lr_factor=0.1), training)
    fork.run(3)

    fork.run(300, preset="repair")

    assert fork._state["actions"]["run"]["lr_factor"] == 0.1
    with pytest.raises(UnknownNameError, match="unknown preset of actions 'repare'; did you mean 'repair'"):
        fork.run(1, preset="repare")


def test_an_interrupted_search_ranks_what_there_is() -> None:
    class Impatient(DeepSigmoids):
        def step(self, k: int) -> Tensor:
            if k == 10:
                raise KeyboardInterrupt
            return super().step(k)

    healing = heal(
        Impatient, budget_steps=600, candidates=[Candidate("none"), Candidate("less", lr_factor=0.1)], progress=False
    )

    assert {fork.candidate.name for fork in healing.forks} == {"none", "less"}


def test_a_remedy_that_does_not_apply_says_why(healing: Healing, capsys: pytest.CaptureFixture[str]) -> None:
    healing.show()

    assert next(f.failed for f in healing.forks if f.candidate.name == "output mended") == "nothing to change"
    assert "nothing to change" in capsys.readouterr().out


def test_a_budget_below_one_step_a_candidate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'budget_steps' must be >= 11 .*: 3"):
        heal(DeepSigmoids, budget_steps=3, progress=False)
