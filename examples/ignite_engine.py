"""PyTorch Ignite: attach to the engine."""

import torch
from ignite.engine import Engine
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch as gw
from gradwatch.integrations.ignite import GradWatch

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
batches = list(zip(x.split(64), y.split(64), strict=True))
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One step."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.detach()


trainer = Engine(update)
GradWatch(model, optimizer, run_dir="runs/ignite").attach(trainer)
trainer.run(batches, max_epochs=2)

print(gw.load("runs/ignite").summary())
