from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.compact import Keep, compact_run
from gradwatch.errors import UnknownNameError
from gradwatch.reporters import digest as digest_module
from gradwatch.reporters.binning import Band, Bins, coarse
from gradwatch.reporters.digest import Digest
from gradwatch.run import load
from gradwatch.testing import write_run
from tests.reporters.conftest import MakeRun


def test_every_step_has_its_own_bin_when_there_is_room(made_runs: MakeRun) -> None:
    run = made_runs(steps=40)
    digest = Digest.of(run, 100)

    assert digest.first.tolist() == digest.last.tolist() == list(range(40))
    np.testing.assert_allclose(digest.norms.mid, run.grad_norms(by="layer"), rtol=1e-6)


def test_bins_cover_every_step_once(made_runs: MakeRun) -> None:
    digest = Digest.of(made_runs(steps=400), 30)

    assert len(digest) == 30
    assert digest.first[0] == 0
    assert digest.last[-1] == 399
    np.testing.assert_array_equal(digest.first[1:], digest.last[:-1] + 1)


@pytest.mark.parametrize("columns", [1, 7, 60, 399])
def test_no_extreme_is_lost_between_the_columns(made_runs: MakeRun, columns: int) -> None:
    run = made_runs("spike")
    norms = run.grad_norms(by="layer").to_numpy()
    digest = Digest.of(run, columns)

    np.testing.assert_allclose(digest.norms.high.max(axis=0), norms.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(digest.norms.low.min(axis=0), norms.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(digest.metrics["global_norm"].high.max(), run.metrics()["global_norm"].max())


def test_a_spike_is_what_a_column_shows(made_runs: MakeRun) -> None:
    run = made_runs("spike")
    shown = Digest.of(run, 20).norms.striking()

    np.testing.assert_allclose(shown.max(axis=0), run.grad_norms(by="layer").to_numpy().max(axis=0), rtol=1e-6)


def test_a_norm_that_is_not_finite_is_marked_and_does_not_hide_the_others(made_runs: MakeRun) -> None:
    digest = Digest.of(made_runs("nan"), 40)

    assert digest.nonfinite[-1].all()
    assert not digest.nonfinite[0].any()
    assert np.isfinite(digest.norms.mid[0]).all()


def test_a_digest_from_rollups_bounds_the_exact_one(made_runs: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_runs("spike", steps=3000, parameters=6)
    exact = Digest.of(run, 30)
    monkeypatch.setattr(digest_module, "EXACT_VALUES", 0)
    rolled = Digest.of(run, 30)

    assert (exact.exact, rolled.exact) == (True, False)
    assert rolled.first.tolist() == exact.first.tolist()
    assert (rolled.norms.high >= exact.norms.high * (1 - 1e-6)).all()
    assert (rolled.norms.low <= exact.norms.low * (1 + 1e-6)).all()


def test_a_digest_from_rollups_of_layers_with_one_tensor_is_exact(
    made_runs: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.reporters.conftest import named_parameters

    run = made_runs("nan", steps=3000, parameters=named_parameters(("a", "b", "c")))
    exact = Digest.of(run, 30)
    monkeypatch.setattr(digest_module, "EXACT_VALUES", 0)
    rolled = Digest.of(run, 30)

    assert rolled.exact
    np.testing.assert_allclose(rolled.norms.high, exact.norms.high, rtol=1e-6)
    np.testing.assert_allclose(rolled.norms.low, exact.norms.low, rtol=1e-6)
    np.testing.assert_array_equal(rolled.nonfinite, exact.nonfinite)


def test_only_the_asked_for_steps_are_gathered(made_runs: MakeRun) -> None:
    digest = Digest.of(made_runs(), 1000, steps=slice(100, 120))

    assert digest.first.tolist() == list(range(100, 120))


def test_an_empty_run_gives_an_empty_digest(made_runs: MakeRun) -> None:
    digest = Digest.of(made_runs(steps=0), 100)

    assert len(digest) == 0
    assert len(digest.layers) == 12


def test_only_the_asked_for_layers_are_kept(made_runs: MakeRun) -> None:
    digest = Digest.of(made_runs(), 50).only(["layers.1", "layers.1?"])

    assert digest.layers == ("layers.1", "layers.10", "layers.11")
    assert digest.norms.mid.shape == digest.nonfinite.shape == (50, 3)


def test_a_layer_that_does_not_exist_is_an_error_that_names_it(made_runs: MakeRun) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer.1'; did you mean 'layers.1'"):
        Digest.of(made_runs(), 50).only("layer.1")


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40))
def test_a_band_holds_the_extremes_and_a_measured_middle(values: list[float]) -> None:
    band = Band.blank(1)
    band.fill(0, np.array(values))
    finite = sorted(v for v in values if np.isfinite(v))

    if finite:
        assert (band.low[0], band.high[0]) == (finite[0], finite[-1])
        assert band.mid[0] == finite[(len(finite) - 1) // 2]
    else:
        assert np.isnan([band.low[0], band.mid[0], band.high[0]]).all()


def test_steps_outside_of_all_bins_belong_to_none() -> None:
    bins = Bins(np.array([10, 30]), np.array([19, 39]))

    assert bins.of(np.array([9, 10, 19, 25, 39, 40])).tolist() == [-1, 0, 0, -1, 1, -1]


@given(st.integers(1, 10**8), st.integers(1, 2000))
def test_coarse_bins_are_a_digit_and_zeros_and_at_most_as_many_as_asked_for(n: int, columns: int) -> None:
    width = coarse(n, columns)

    assert -(-n // width) <= columns
    assert set(str(width)[1:]) <= {"0"} or width < 10


def test_a_compacted_run_shows_the_extremes_of_the_steps_that_are_gone(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=5000, parameters=6, scenario="spike")
    before = Digest.of(load(path), 50)
    compact_run(path, keep=Keep(100, around=10, first=100))
    after = Digest.of(load(path), 50)

    assert len(load(path)) == 200
    assert after.first.tolist() == before.first.tolist()
    assert after.last.tolist() == before.last.tolist()
    assert (after.norms.high >= before.norms.high * (1 - 1e-6)).all()
    np.testing.assert_allclose(after.metrics["global_norm"].high, before.metrics["global_norm"].high, rtol=1e-6)
