"""A plain PyTorch loop: digits, a convolutional network, gradwatch in two lines."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch as gw

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
y = torch.tensor(digits.target)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

with gw.watch(model, optimizer, run_dir="runs/pytorch", actions="protect") as watcher:
    for epoch in range(2):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss, epoch=epoch)

run = gw.load("runs/pytorch")
print(run.summary())
run.report("pytorch.html")
