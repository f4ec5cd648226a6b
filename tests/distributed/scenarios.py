"""What the ranks of a pool run. Each function runs on every rank and returns what a pipe can carry."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

import gradwatch as gw
from gradwatch.backends import torch_device
from gradwatch.integrations.torch_distributed import RankWatcher
from gradwatch.records import Finding, StepBatch
from tests.distributed.problem import BATCH, OUT, WIDTH, batch, network, sequences, transformer_like
from tests.torch.waits import Waits


def build(kind: str) -> tuple[nn.Module, Optimizer]:
    """A model spread over the ranks in one of the ways of torch, and its optimizer."""
    count, model = distributed.get_world_size(), network()
    if kind in ("ddp", "no_sync"):
        wrapped: nn.Module = DistributedDataParallel(model)
    elif kind == "zero":
        wrapped = DistributedDataParallel(model)
        return wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), Adam, lr=0.05)
    elif kind == "fsdp2":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=init_device_mesh("cpu", (count,)))
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (count,)))  # type: ignore[assignment]
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
        wrapped = fully_shard(model, mesh=mesh)  # type: ignore[assignment]
    elif kind == "fsdp1":
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
        wrapped = parallelize_module(model, init_device_mesh("cpu", (count,)), plan)
    return wrapped, Adam(wrapped.parameters(), lr=0.05, foreach=False)


def backward(kind: str, model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    """One backward pass, with this rank's part of the batch."""
    x, y = batch(step, scale)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if kind != "tp":
        part = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
        x, y = x[part], y[part]
    if kind == "no_sync":
        assert isinstance(model, DistributedDataParallel)
        half = len(x) // 2
        with model.no_sync():
            (nn.functional.mse_loss(model(x[:half]), y[:half]) / 2).backward()
        x, y = x[half:], y[half:]
    loss = nn.functional.mse_loss(model(x), y) / (2 if kind == "no_sync" else 1)
    loss.backward()
    return loss


def full(tensor: Tensor) -> Any:
    """The whole tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().numpy()


def weights(kind: str, model: nn.Module) -> list[Any]:
    """The whole weights of this rank's model, in order."""
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            return [full(parameter) for parameter in model.parameters()]
    return [full(parameter) for parameter in model.parameters()]


def record_of(run_dir: str) -> dict[str, Any]:
    """What rank 0 recorded."""
    run = gw.load(run_dir)
    norms = run.grad_norms()
    return {
        "names": list(norms.columns),
        "norms": norms.to_numpy(),
        "metrics": run.metrics().to_dict("list"),
        "steps": list(norms.index),
        "weight_norm": run.statistic("weight_norm").to_numpy(),
        "update_ratio": run.statistic("update_ratio").to_numpy(),
        "grad_max": run.statistic("grad_max").to_numpy(),
        "actions": run.actions().to_dict("list"),
        "marks": [event["text"] for event in run.events("mark") if "text" in event],
        "world_size": run.info.world_size,
        "status": run.info.status,
    }


def found_at_step_7(batch: StepBatch) -> list[Finding]:
    """A detector that cannot miss."""
    hit = 7 in batch.step
    return [Finding("exploding-7", "exploding", "critical", 7, 7, message="too large")] if hit else []


def train(
    kind: str,
    run_dir: str,
    *,
    steps: int = 12,
    actions: str = "",
    bad: Sequence[int] = (),
    clip: float = 0.0,
    settle: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train and watch; `bad` steps have inputs that are not finite on the last rank, or on all with tensor parallel."""
    model, optimizer = build(kind)
    settings = {"flush_every": 5, "stats_every": 5, "actions": ACTIONS[actions], "rank_timeout": 20.0, **settings}
    if actions in ("DecayLR", "Rollback"):
        settings["detectors"] = [found_at_step_7]
    watcher = gw.watch(model, optimizer, run_dir=run_dir, **settings)
    assert isinstance(watcher, RankWatcher)
    totals = []
    is_hit = kind == "tp" or distributed.get_rank() == distributed.get_world_size() - 1
    collectives = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = backward(kind, model, step, float("nan") if step in bad and is_hit else 1.0)
        if clip:
            if isinstance(model, FullyShardedDataParallel):
                total = model.clip_grad_norm_(clip)
            else:
                total = nn.utils.clip_grad_norm_(model.parameters(), clip)
            totals.append(float(total.full_tensor() if isinstance(total, DTensor) else total))
        optimizer.step()
        watcher.log(loss=loss)
        if settle and watcher._ranks is not None:
            watcher._ranks.exchange.met()
            for message, _ in watcher._ranks._under_way:
                message.done.wait(20.0)
        collectives.append(watcher._ranks.exchange.collectives if watcher._ranks is not None else 0)
    watcher.close()
    if watcher._ranks is not None and watcher._ranks.exchange.failure:
        raise AssertionError(watcher._ranks.exchange.failure)
    if watcher.faults.messages:
        raise AssertionError(watcher.faults.messages)
    found: dict[str, Any] = {
        "weights": weights(kind, model),
        "totals": totals,
        "collectives": collectives,
    }
    if distributed.get_rank() == 0:
        found["record"] = record_of(run_dir)
    distributed.barrier()
    return found


def train_plain(kind: str, *, steps: int = 12) -> list[Any]:
    """The same training, which nobody watches."""
    model, optimizer = build(kind)
    for step in range(steps):
        optimizer.zero_grad()
        backward(kind, model, step)
        optimizer.step()
    return weights(kind, model)


ACTIONS: dict[str, Any] = {
    "": [],
    "Clip": [gw.Clip(max_norm=0.05)],
    "Clip per layer": [gw.Clip(per_layer=0.03)],
    "Clip by value": [gw.Clip(value=0.01)],
    "SkipStep": [gw.SkipStep()],
    "SkipStep and Clip": [gw.SkipStep(), gw.Clip(max_norm=0.05)],
    "ZClip": [gw.ZClip()],
    "DecayLR": [gw.DecayLR(factor=0.5, on="exploding")],
    "Rollback": [gw.Rollback(every=2, factor=0.5, on="exploding", patience=0)],
}


def _loop(model: nn.Module, optimizer: Optimizer, watcher: Any, steps: range, kind: str = "ddp") -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = backward(kind, model, step)
        optimizer.step()
        watcher.log(loss=loss)


def sequence_parallel(
    run_dir: str, *, steps: int = 8, actions: str = "", clip: float = 0.0, decay: float = 0.0, is_sharded: bool = False
) -> dict[str, Any]:
    """A norm whose gradients are sums over the ranks, which each see a part of every sequence."""
    count, rank = distributed.get_world_size(), distributed.get_rank()
    rows = slice(None)
    mesh = init_device_mesh("cpu", (count,))
    if is_sharded:
        both = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("data", "model"))
        mesh, rows = both["model"], slice(2 * (rank // (count // 2)), 2 * (rank // (count // 2)) + 2)
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    model = parallelize_module(transformer_like(), mesh, plan)
    if is_sharded:
        fully_shard(model, mesh=both["data"])
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=decay) if decay else Adam(model.parameters(), lr=0.05)
    settings: dict[str, Any] = {"flush_every": 3, "stats_every": 3, "rank_timeout": 20.0, "actions": ACTIONS[actions]}
    with gw.watch(model, optimizer, run_dir=run_dir, **settings) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            x, y = (tensor[rows] for tensor in sequences(step))
            part = x.chunk(mesh.size(), 1)[mesh.get_local_rank()]
            nn.functional.mse_loss(model(part), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    assert not watcher.faults.messages, watcher.faults.messages
    found: dict[str, Any] = {"weights": [full(parameter) for parameter in model.parameters()]}
    if rank == 0:
        found["record"] = record_of(run_dir)
        found["findings"] = list(gw.load(run_dir).findings()["rule"])
    distributed.barrier()
    return found


def as_on_accelerator(
    run_dir: str, actions: str, *, kind: str = "fsdp2", is_host: bool = False, **more: Any
) -> dict[str, Any]:
    """A model whose tensors are taken for those of an accelerator; counts what would make the host wait."""
    before, torch_device.HOST = torch_device.HOST, ("cpu",) if is_host else ()
    model, _ = build(kind)
    optimizer = AdamW(model.parameters(), lr=0.05, fused=True)
    settings: dict[str, Any] = {"flush_every": 50, "stats_every": 5, "actions": ACTIONS[actions], **more}
    counts = []
    with gw.watch(model, optimizer, run_dir=run_dir, **settings) as watcher, Waits() as waits:
        for step in range(10):
            optimizer.zero_grad()
            loss = backward(kind, model, step)
            optimizer.step()
            watcher.log(loss=loss)
            counts.append(watcher._ranks.exchange.collectives)  # type: ignore[attr-defined]
    torch_device.HOST = before
    assert not watcher.faults.messages, watcher.faults.messages
    found = {"weights": weights(kind, model), "waits": waits.names, "collectives": np.diff(counts)[-4:].tolist()}
    if distributed.get_rank() == 0:
        found["record"] = record_of(run_dir)
    distributed.barrier()
    return found


def pipeline(run_dir: str) -> Any:
    """Each rank holds one layer; activations and their gradients are sent along by hand."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    layers = [network()[0], nn.Sequential(network()[2], nn.Tanh(), network()[4])]
    assert count == len(layers)
    stage = nn.ModuleDict({f"stage{rank}": layers[rank]})
    optimizer = SGD(stage.parameters(), lr=0.05)
    with gw.watch(stage, optimizer, run_dir=run_dir, flush_every=3, actions=[gw.Clip(max_norm=0.5)]):
        for step in range(8):
            optimizer.zero_grad()
            x, y = batch(step)
            if rank == 0:
                out = layers[0](x)
                distributed.send(out.detach(), 1)
                grad = torch.empty_like(out)
                distributed.recv(grad, 1)
                out.backward(grad)
            else:
                received = torch.empty(BATCH, 12)
                distributed.recv(received, 0)
                received.requires_grad_()
                nn.functional.mse_loss(layers[1](received), y).backward()
                assert received.grad is not None
                distributed.send(received.grad, 0)
            optimizer.step()
    parameters = [full(parameter) for parameter in stage.parameters()]
    return parameters, record_of(run_dir) if rank == 0 else None


def experts(run_dir: str) -> Any:
    """A shared layer that the loop averages by hand, and an expert of its own on each rank, in turn without input."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    shared = network()[0]
    torch.manual_seed(10 + rank)
    expert = nn.Linear(12, OUT)
    model = nn.ModuleDict({"shared": shared, "expert": expert})
    optimizer = SGD(model.parameters(), lr=0.05)
    norms = []
    with gw.watch(model, optimizer, run_dir=run_dir, flush_every=3) as watcher:
        for step in range(6):
            optimizer.zero_grad()
            x, _ = batch(step + 10 * rank)
            hidden = shared(x)
            is_used = step % count == rank or step == 0
            (expert(hidden) if is_used else hidden).square().mean().backward()
            for parameter in shared.parameters():
                distributed.all_reduce(parameter.grad)
            grads = [layer.weight.grad for layer in (expert, shared)]
            norms.append([0.0 if grad is None else float(torch.linalg.vector_norm(grad)) for grad in grads])
            optimizer.step()
    assert not watcher.faults.messages
    return norms, record_of(run_dir) if rank == 0 else None


def unused(run_dir: str) -> Any:
    """A branch that the loss does not use at odd steps."""
    model = nn.ModuleDict({"used": nn.Linear(WIDTH, OUT), "spare": nn.Linear(WIDTH, OUT)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, is_odd: bool) -> Tensor:
            used: Tensor = self.parts["used"](x)
            return used if is_odd else used + self.parts["spare"](x)

    wrapped = DistributedDataParallel(Both(), find_unused_parameters=True)
    optimizer = SGD(wrapped.parameters(), lr=0.05)
    with gw.watch(wrapped, optimizer, run_dir=run_dir, actions=[gw.Clip(max_norm=0.1)]) as watcher:
        for step in range(6):
            optimizer.zero_grad(set_to_none=True)
            x, y = batch(step)
            nn.functional.mse_loss(wrapped(x, step % 2 == 1), y).backward()
            optimizer.step()
    assert not watcher.faults.messages
    return weights("ddp", wrapped), record_of(run_dir) if distributed.get_rank() == 0 else None


def uneven(run_dir: str, actions: str = "") -> Any:
    """Ranks with different numbers of batches, under `Join`."""
    rank = distributed.get_rank()
    model, optimizer = build("ddp")
    assert isinstance(model, DistributedDataParallel)
    started = time.monotonic()
    settings: dict[str, Any] = {"detectors": [found_at_step_7], "rank_timeout": 3.0} if actions else {}
    settings |= {"actions": ACTIONS[actions], "flush_every": 5}
    with gw.watch(model, optimizer, run_dir=run_dir, **settings) as watcher, model.join():
        _loop(model, optimizer, watcher, range(20 if rank == 0 else 8))
    distributed.barrier()
    return time.monotonic() - started, record_of(run_dir) if rank == 0 else None


def only_rank_0(run_dir: str) -> Any:
    """The loop watches on rank 0 only, a model of which it holds a part."""
    model, optimizer = build("fsdp2")
    rank, watcher = distributed.get_rank(), contextlib.nullcontext(None)
    if rank == 0:
        watcher = gw.watch(model, optimizer, run_dir=run_dir, rank_timeout=1.0, flush_every=5)  # type: ignore[assignment]
    with watcher:
        for step in range(12):
            optimizer.zero_grad()
            backward("fsdp2", model, step)
            optimizer.step()
        if rank == 0:
            time.sleep(1.5)
    distributed.barrier()
    return record_of(run_dir) if rank == 0 else None


def slow(run_dir: str) -> Any:
    """The last rank comes late to every tenth step, by more than an exchange takes."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    model, optimizer = build("fsdp2")
    with gw.watch(model, optimizer, run_dir=run_dir, actions=ACTIONS["DecayLR"], flush_every=3) as watcher:
        for step in range(12):
            if rank == count - 1 and step % 5 == 4:
                time.sleep(0.7)
            _loop(model, optimizer, watcher, range(step, step + 1), "fsdp2")
    assert watcher._ranks.alone == ""  # type: ignore[attr-defined]
    return record_of(run_dir) if rank == 0 else None


def personal(run_dir: str) -> Any:
    """Every rank's own norm and loss, with a batch on the last rank that is not finite at step 6 and huge at step 9."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    model, optimizer = build("ddp")
    own = []
    with gw.watch(
        model, optimizer, run_dir=run_dir, per_rank=True, flush_every=4, actions=[gw.SkipStep(), gw.Clip(max_norm=0.1)]
    ) as watcher:
        for step in range(12):
            scale = {6: float("nan"), 9: 1e4}.get(step, 1.0) if rank == count - 1 else 1.0
            x, y = batch(step, scale)
            part = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
            bare = network()
            bare.load_state_dict({name[7:]: value for name, value in model.state_dict().items()})
            nn.functional.mse_loss(bare(x[part]), y[part]).backward()
            own.append(float(torch.nn.utils.get_total_norm([p.grad for p in bare.parameters() if p.grad is not None])))
            optimizer.zero_grad()
            loss = backward("ddp", model, step, scale)
            optimizer.step()
            watcher.log(loss=loss)
    return own, record_of(run_dir) if rank == 0 else None


def killed(run_dir: str, kind: str, actions: str = "DecayLR") -> Any:
    """The last rank is killed between two steps; the others go on alone as far as torch lets them."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    model, optimizer = build(kind)
    watcher = gw.watch(model, optimizer, run_dir=run_dir, actions=ACTIONS[actions], flush_every=3, rank_timeout=10.0)
    _loop(model, optimizer, watcher, range(8), kind)
    if rank == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    survivor = network()
    own = SGD(survivor.parameters(), lr=0.1)
    error = ""
    try:
        _loop(model, optimizer, watcher, range(8, 12), kind)
    except RuntimeError as raised:
        error = type(raised).__name__
    own.step()
    watcher.close("crashed", error)
    if rank:
        os._exit(1)  # as a process that raised: others may be waiting for it
    return error, record_of(run_dir)


def first_life(run_dir: str, steps: int = 5) -> Any:
    """A run that a restart with another number of ranks goes on with."""
    model, optimizer = build("ddp")
    with gw.watch(model, optimizer, run_dir=run_dir, resume=True, actions=ACTIONS["DecayLR"]) as watcher:
        _loop(model, optimizer, watcher, range(steps))
    return record_of(run_dir) if distributed.get_rank() == 0 else None
