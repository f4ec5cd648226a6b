"""A training that torchrun starts: `elastic.py RUN_DIR`. What `LOSES` says is lost at step 11 of the first start."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import distributed, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

import gradwatch as gw


def main(run_dir: str) -> None:
    """Train twenty steps a start."""
    torch.set_num_threads(1)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    # By itself torch 2.13 may find the addresses of the first start in the store of torchrun.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    own = PrefixStore(f"start {is_first}", store)
    distributed.init_process_group("gloo", store=own, rank=rank, world_size=count)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gw.watch(model, optimizer, run_dir=run_dir, resume=True, flush_every=5) as watcher:
        for step in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss)
            if is_first and step == 11:
                if os.environ["LOSES"] == "the node":
                    os.kill(os.getppid(), signal.SIGKILL)
                if os.environ["LOSES"] == "the node" or (os.environ["LOSES"] == "a worker" and rank == count - 1):
                    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
