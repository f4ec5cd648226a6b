"""The replay of the first rank of a large training."""

from __future__ import annotations

from benchmarks.scale import Layout, replay


def test_norms_of_the_whole_come_out_of_the_ranks_parts() -> None:
    parts, worst = replay(Layout(20, every=5), ranks=16, exchanges=2)
    assert set(parts) == {"pack", "unpack", "find and record"}
    assert worst < 1e-6


def test_without_an_action_in_the_step_collectives_come_only_at_a_flush() -> None:
    assert Layout(1000, every=50).collectives_a_step == 1 / 50
    assert Layout(1000, every=50, clips=True).collectives_a_step == 1 + 1 / 50
    assert Layout(1000).bytes_a_step < 13 * 1000
