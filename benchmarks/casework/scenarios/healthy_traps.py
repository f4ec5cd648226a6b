"""Healthy trainings whose norms look alarming to a threshold."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework.case import Training
from benchmarks.casework.scenarios.base import Batches, healthy, supervised
from benchmarks.casework.scenarios.parts import (
    cnn,
    diabetes,
    digits,
    epochs,
    flat_cross_entropy,
    mlp,
    mnist,
    passages,
    transformer,
)


@healthy(learns=1.0)
def finetune_tiny_norms() -> Training:
    """A pretrained network tuned further with a small learning rate: norms are small and stay so."""
    model = mlp(64, 64, 64, 10)
    batches = epochs(*digits(), size=64)
    pretraining = supervised(model, torch.optim.Adam(model.parameters(), lr=3e-3), batches, steps=500)
    for k in range(pretraining.steps):
        pretraining.step(k)
    return supervised(model, torch.optim.AdamW(model.parameters(), lr=2e-5), batches, steps=800)


@healthy()
def heavy_tailed_regression() -> Training:
    """Student-t noise with 1.5 degrees of freedom: an honest outlier every few batches."""
    model = mlp(10, 32, 1)
    x = torch.randn(4000, 10)
    noise = torch.distributions.StudentT(1.5).sample((4000, 1)) * 0.3
    y = 5 * torch.sin(x[:, :1]) + 3 * x[:, 1:2] + noise.clamp(-60, 60)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return supervised(model, optimizer, epochs(x, y, size=32), F.smooth_l1_loss, steps=1200)


@healthy(learns=0.9)
def heavy_tailed_squared() -> Training:
    """The same kind of data under the squared loss: single losses are a hundred times the usual one."""
    model = mlp(10, 32, 1)
    x = torch.randn(4000, 10)
    noise = torch.distributions.StudentT(2.5).sample((4000, 1)).clamp(-30, 30)
    y = 5 * torch.sin(x[:, :1]) + 3 * x[:, 1:2] + noise
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(x, y, size=64), F.mse_loss, steps=1200)


@healthy()
def zero_initialised_last_layer() -> Training:
    """All layers but the last have a gradient of exactly zero at step 0."""
    model = mlp(64, 64, 64, 10)
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs(*digits(), size=32), steps=800)


@healthy()
def converges_to_zero() -> Training:
    """Noise-free least squares with full batches: the loss falls to rounding error, the gradients with it."""
    model = nn.Linear(8, 1)
    x = torch.linalg.qr(torch.randn(64, 8))[0] * 8
    y = x @ torch.randn(8, 1)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.2), epochs(x, y, size=64), F.mse_loss, steps=600)


@healthy()
def memorises_64_samples() -> Training:
    """Loss to about 1e-5: gradients fall by orders of magnitude while all is well."""
    x, y = digits()
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(x[:64], y[:64], size=32), steps=1500)


@healthy()
def interpolates_sgd() -> Training:
    """SGD until every digit is learnt by heart; many batches then have almost no loss, a few have some."""
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=2500)


@healthy()
def cosine_restarts() -> Training:
    """Loshchilov & Hutter 2017: the rate jumps from almost zero back to its top."""
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def rate(k: int) -> float:
        return 0.05 * (0.001 + 0.4995 * (1 + math.cos(math.pi * (k % 150) / 150)))

    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=600, rate=rate)


@healthy()
def step_decay() -> Training:
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=900, rate=lambda k: 0.1 * 0.1 ** (k // 300))


@healthy()
def one_cycle() -> Training:
    """Smith 2018: the rate rises twentyfold over a third of the run."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def rate(k: int) -> float:
        return 0.01 + 0.19 * (k / 250) if k < 250 else 0.2 * (1 - (k - 250) / 560)

    return supervised(model, optimizer, epochs(*digits(), size=64), steps=800, rate=rate)


@healthy()
def curriculum_change() -> Training:
    """Digits 0 to 4 first; from step 300 all ten: loss and norms jump and fall again."""
    x, y = digits()
    easy, hard = epochs(x[y < 5], y[y < 5], size=32), epochs(x, y, size=32)

    def batches() -> Batches:
        for _ in range(300):
            yield next(easy)
        yield from hard

    model = mlp(64, 64, 64, 10)
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), batches(), steps=900)


@healthy()
def single_sample_batches() -> Training:
    model = mlp(64, 64, 10)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.02), epochs(*digits(), size=1), steps=3000)


@healthy()
def tiny_batches_small_set() -> Training:
    """442 patients in batches of 4: noise all the way."""
    model = mlp(10, 16, 1, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return supervised(model, optimizer, epochs(*diabetes(), size=4), F.mse_loss, steps=2000)


@healthy()
def frozen_backbone() -> Training:
    """Only the head is trained; the rest never has a gradient, on purpose."""
    model = cnn()
    for parameter in model[:-1].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model[-1].parameters(), lr=3e-3)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=400)


@healthy()
def gradual_unfreezing() -> Training:
    """Howard & Ruder 2018: lower layers join the training at steps 200 and 400."""
    model = mlp(64, 64, 64, 10)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    for layer in layers[:2]:
        layer.requires_grad_(False)

    def thaw(k: int) -> None:
        if k in (200, 400):
            layers[2 - k // 200].requires_grad_(True)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=700, before_step=thaw)


@healthy(learns=0.9)
def tied_weights() -> Training:
    """Input and output embedding are one tensor."""
    model = transformer(1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return supervised(model, optimizer, passages(16, 32), flat_cross_entropy, steps=400)


@healthy()
def dropout_heavy() -> Training:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.6), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.6)]
    model = nn.Sequential(nn.Dropout(0.2), *hidden, nn.Linear(256, 10))
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=700)


@healthy(learns=0.5)
def hinge_reaches_zero() -> Training:
    """A hinge loss on two separable digits: most late batches have a gradient of exactly zero."""
    x, y = digits()
    chosen = y < 2
    model = mlp(64, 16, 1)

    def hinge(output: Tensor, target: Tensor) -> Tensor:
        return (1 - (2 * target[:, None] - 1) * output).relu().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return supervised(model, optimizer, epochs(x[chosen], y[chosen], size=16), hinge, steps=800)


@healthy(learns=0.5)
def triplet_margin() -> Training:
    """Metric learning: the loss of a batch is often exactly zero once the classes are apart."""
    x, y = digits()
    model = mlp(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    groups = [x[y == digit] for digit in range(10)]

    def step(k: int) -> Tensor:
        own, other = torch.randperm(10)[:2].tolist()
        anchor, positive = (groups[own][torch.randint(len(groups[own]), (24,))] for _ in range(2))
        negative = groups[other][torch.randint(len(groups[other]), (24,))]
        loss = F.triplet_margin_loss(model(anchor), model(positive), model(negative), margin=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Training(model, optimizer, step, 1000)


class TwoHeads(nn.Module):
    """A shared trunk with two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 2)])


@healthy()
def alternating_heads() -> Training:
    """Each step trains one task; the other head then has no gradient at all."""
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = epochs(*digits(), size=32)

    def step(k: int) -> Tensor:
        x, y = next(batches)
        task = k % 2
        logits = model.heads[task](model.trunk(x))
        loss = F.cross_entropy(logits, y if task == 0 else y % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Training(model, optimizer, step, 1000)


class Experts(nn.Module):
    """Noisy top-1 routing over four experts (Shazeer et al. 2017): an expert may see no sample of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        chosen = (scores + torch.randn_like(scores)).argmax(1)
        best = scores.softmax(1).gather(1, chosen[:, None])
        outputs = torch.zeros(len(x), 10)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            if rows.any():
                outputs = outputs.index_put((rows,), expert(x[rows]))
        mixed: Tensor = outputs * best * 4
        return mixed


@healthy()
def mixture_of_experts() -> Training:
    model = Experts()
    return supervised(model, torch.optim.Adam(model.parameters(), lr=2e-3), epochs(*digits(), size=16), steps=1000)


@healthy()
def rate_warms_up_from_zero() -> Training:
    """The first update is exactly nothing, because the rate is."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=800, rate=lambda k: 0.2 * min(1.0, k / 200))


@healthy()
def absolute_loss_constant_norm() -> Training:
    """The L1 loss has gradients of the same size however small it is."""
    x = torch.randn(2000, 10)
    y = x @ torch.randn(10, 1)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rate = 0.02
    return supervised(model, optimizer, epochs(x, y, size=32), F.l1_loss, steps=800, rate=lambda k: rate * 0.995**k)


@healthy()
def bfloat16_autocast() -> Training:
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out: Tensor = self.inner(x)
            return out

    return supervised(Autocast(), optimizer, epochs(*mnist(), size=32), loss, steps=300)


@healthy()
def float16_grad_scaler() -> Training:
    """Mixed precision as PyTorch's guide has it: the scale starts far too high, so the first steps are skipped."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=200)
    batches = epochs(*digits(), size=32)

    def step(k: int) -> Tensor:
        x, y = next(batches)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Training(model, optimizer, step, 600)


@healthy()
def poisson_counts() -> Training:
    x = torch.randn(4000, 10)
    y = torch.poisson((0.5 * x[:, :1] - 0.4 * x[:, 1:2] + 1.5).exp())
    model = mlp(10, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return supervised(model, optimizer, epochs(x, y, size=64), nn.PoissonNLLLoss(), steps=800)
