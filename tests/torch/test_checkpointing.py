"""Activation checkpointing: the forward pass runs twice, the record counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.torch.loops import Recorder, assert_norms, assert_same, data, mse, reference, state_of, watching


class Blocks(nn.Module):
    """A stem, four blocks, of which each may be computed anew in the backward pass, and a head.

    Args:
        reentrant: Which of torch's two ways; None keeps all activations.
        whole: Also compute stem and head anew, so that every gradient arrives in a nested pass.
    """

    def __init__(self, *, reentrant: bool | None, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2)) for _ in range(4))
        self.reentrant, self.whole = reentrant, whole

    def forward(self, x: Tensor) -> Any:
        hidden = self._call(self.stem, x.requires_grad_(), kept=not self.whole)
        for block in self.blocks:
            hidden = self._call(block, hidden)
        return self._call(self.head, hidden, kept=not self.whole)

    def _call(self, part: nn.Module, x: Tensor, *, kept: bool = False) -> Any:
        return part(x) if kept or self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)


def _train(run_dir: Path, model: Blocks) -> tuple[Recorder, list[list[float]], list[Any], list[int]]:
    """Train; the record, the true norms, what is left, and the measurements that each step took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected, measured = [], []
    with watching(run_dir, model, optimizer, activations=True, stats_every=3) as (watcher, record):
        measure, calls = watcher.pending.measure, [0]

        def counted() -> None:
            calls[0] += 1
            measure()

        watcher.pending.measure = counted  # type: ignore[method-assign]
        for x, y in data(8):
            calls[0] = 0
            optimizer.zero_grad()
            loss = mse(model, x, y)
            loss.backward()
            expected.append(reference(model.parameters()))
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            watcher.log(loss=loss)
            measured.append(calls[0])
    return record, expected, state_of(model, optimizer), measured


WAYS = pytest.mark.parametrize(
    ("reentrant", "whole"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["blocks", "everything", "blocks, re-entrant", "everything, re-entrant"],
)


@WAYS
def test_the_record_is_that_without_checkpointing(run_dir: Path, tmp_path: Path, reentrant: bool, whole: bool) -> None:
    record, expected, left, _ = _train(run_dir, Blocks(reentrant=reentrant, whole=whole))
    other, _, other_left, _ = _train(tmp_path / "other", Blocks(reentrant=None))
    assert_norms(record.norms, expected)
    assert_same(left, other_left)
    assert record.names == other.names
    for name in ("loss", "clip_coefficient", "global_norm"):
        np.testing.assert_allclose(record.metric(name), other.metric(name), rtol=1e-6, err_msg=name)
    for name in ("activation_mean", "dead_fraction", "output_grad_norm", "zero_fraction"):
        for step, row in record.samples(name).items():
            np.testing.assert_allclose(row, other.samples(name)[step], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_measured_once_a_step(run_dir: Path, reentrant: bool | None) -> None:
    _, _, _, measured = _train(run_dir, Blocks(reentrant=reentrant))
    assert measured == [1] * 8


def test_a_nested_pass_that_raises_does_not_hide_the_next_step(run_dir: Path) -> None:
    model = Blocks(reentrant=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    broken = [False]

    def maybe_raise(gradient: Tensor) -> None:
        if broken[0]:
            raise RuntimeError("out of memory")

    model.blocks[1][0].weight.register_hook(maybe_raise)  # type: ignore[index]
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for i, (x, y) in enumerate(data(6)):
            optimizer.zero_grad()
            broken[0] = i == 3
            if broken[0]:
                with pytest.raises(RuntimeError, match="out of memory"):
                    mse(model, x, y).backward()
                continue
            mse(model, x, y).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert record.stages == [0] * 5
