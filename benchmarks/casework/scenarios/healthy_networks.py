"""Healthy trainings of the usual kinds of network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework.case import Training
from benchmarks.casework.losses import vae
from benchmarks.casework.networks import VariationalAutoencoder
from benchmarks.casework.scenarios.base import healthy, supervised
from benchmarks.casework.scenarios.parts import (
    Recurrent,
    Residual,
    cnn,
    digits,
    epochs,
    flat_cross_entropy,
    mlp,
    mnist,
    passages,
    set_gain,
    transformer,
    warmup_cosine,
)


@healthy()
def cnn_adam() -> Training:
    model = cnn()
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*mnist(), size=32), steps=500)


@healthy()
def cnn_batchnorm_sgd() -> Training:
    model = cnn(norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=500)


@healthy()
def mlp_sgd() -> Training:
    model = mlp(64, 64, 64, 10)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs(*digits(), size=32), steps=1500)


@healthy()
def mlp_rmsprop() -> Training:
    model = mlp(64, 64, 64, 10)
    return supervised(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=800)


@healthy()
def mlp_adagrad() -> Training:
    model = mlp(64, 64, 64, 10)
    return supervised(model, torch.optim.Adagrad(model.parameters(), lr=0.02), epochs(*digits(), size=32), steps=800)


@healthy()
def mlp_nadam_normed_deep() -> Training:
    model = mlp(64, *[64] * 12, 10, norm=True)
    return supervised(model, torch.optim.NAdam(model.parameters(), lr=5e-4), epochs(*digits(), size=64), steps=400)


@healthy()
def residual_norm_20_blocks() -> Training:
    blocks = [
        Residual(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))) for _ in range(20)
    ]
    model = nn.Sequential(nn.Linear(64, 48), *blocks, nn.LayerNorm(48), nn.Linear(48, 10))
    return supervised(model, torch.optim.AdamW(model.parameters(), lr=5e-4), epochs(*digits(), size=64), steps=400)


@healthy()
def residual_zero_gamma_cnn() -> Training:
    """He et al. 2019: the last normalisation of every residual branch starts at zero."""

    def branch(width: int) -> nn.Module:
        last = nn.BatchNorm2d(width)
        nn.init.zeros_(last.weight)
        inner = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return Residual(nn.Sequential(*inner, nn.Conv2d(width, width, 3, padding=1, bias=False), last))

    stem = [nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*stem, branch(12), nn.ReLU(), branch(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 49, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=400)


@healthy()
def deep_relu_kaiming() -> Training:
    model = set_gain(mlp(64, *[96] * 15, 10), 2.0)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), epochs(*digits(), size=32), steps=600)


@healthy()
def deep_tanh_critical() -> Training:
    """Schoenholz et al. 2017: on the edge of chaos a tanh network of any depth trains."""
    model = set_gain(mlp(64, *[96] * 15, 10, activation=nn.Tanh), 1.76, bias=0.2236)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), epochs(*digits(), size=32), steps=800)


@healthy()
def shallow_sigmoid() -> Training:
    model = mlp(64, 64, 10, activation=nn.Sigmoid)
    return supervised(model, torch.optim.Adam(model.parameters(), lr=3e-3), epochs(*digits(), size=32), steps=800)


@healthy()
def lstm_rows() -> Training:
    x, y = digits()
    model = Recurrent(nn.LSTM, 8, 48, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return supervised(model, optimizer, epochs(x.reshape(-1, 8, 8), y, size=32), steps=600)


@healthy()
def gru_rows_clipped() -> Training:
    x, y = digits()
    model = Recurrent(nn.GRU, 8, 48, 10)

    def clip(k: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return supervised(model, optimizer, epochs(x.reshape(-1, 8, 8), y, size=32), steps=600, before_step=clip)


@healthy()
def rnn_relu_identity() -> Training:
    """Le et al. 2015: a ReLU recurrence that starts at the identity."""
    x, y = digits()
    model = Recurrent(nn.RNN, 4, 48, 10, nonlinearity="relu")
    nn.init.eye_(model.cell.weight_hh_l0)  # type: ignore[arg-type]
    nn.init.normal_(model.cell.weight_ih_l0, 0, 0.1)  # type: ignore[arg-type]
    nn.init.zeros_(model.cell.bias_ih_l0)  # type: ignore[arg-type]
    nn.init.zeros_(model.cell.bias_hh_l0)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(x.reshape(-1, 16, 4), y, size=32), steps=600)


@healthy(learns=0.85)
def transformer_warmup() -> Training:
    model = transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = warmup_cosine(3e-3, warmup=60, steps=500)

    def clip(k: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return supervised(model, optimizer, passages(16, 32), flat_cross_entropy, steps=500, rate=rate, before_step=clip)


@healthy(learns=0.85)
def transformer_accumulation_grows() -> Training:
    """From one micro-batch an update to eight: noise and norms fall at once, and nothing is wrong."""
    model = transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return supervised(
        model,
        optimizer,
        passages(8, 32),
        flat_cross_entropy,
        steps=300,
        rate=warmup_cosine(1e-3, warmup=50, steps=300),
        accumulate=lambda k: 1 if k < 200 else 8,
    )


@healthy()
def vae_summed_loss() -> Training:
    x = mnist()[0].flatten(1)
    model = VariationalAutoencoder(784, hidden=96, latent=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(x, x, size=64), lambda o, t: vae(o, t, 0), steps=500)


@healthy()
def autoencoder_conv() -> Training:
    x = mnist()[0]
    encoder = [nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 4, stride=2, padding=1), nn.ReLU()]
    decoder = [
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
    ]
    model = nn.Sequential(*encoder, *decoder, nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return supervised(model, optimizer, epochs(x, x, size=32), F.mse_loss, steps=400)


class Adversaries(nn.Module):
    """Generator and discriminator under one roof, as they are watched together."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


@healthy(learns=3.0)
def gan_digits() -> Training:
    """Non-saturating GAN (Goodfellow et al. 2014); its losses do not fall, that is its nature."""
    model = Adversaries()
    first = torch.optim.Adam(model.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    second = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    batches = epochs(digits()[0], size=64)
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    cost = F.binary_cross_entropy_with_logits

    def step(k: int) -> Tensor:
        (real,) = next(batches)
        fake = model.generator(torch.randn(64, 16))
        first.zero_grad()
        doubt = cost(model.discriminator(real), ones) + cost(model.discriminator(fake.detach()), zeros)
        doubt.backward()
        first.step()
        second.zero_grad()
        fooled = cost(model.discriminator(fake), ones)
        fooled.backward()
        second.step()
        return (doubt + fooled).detach()

    return Training(model, [first, second], step, 800)


@healthy(learns=0.95)
def reinforce_bandit() -> Training:
    """REINFORCE with a running baseline on a contextual bandit made of the digits: reward 1 for the right digit."""
    model = mlp(64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = epochs(*digits(), size=32)
    baseline = torch.zeros(())

    def step(k: int) -> Tensor:
        x, y = next(batches)
        policy = torch.distributions.Categorical(logits=model(x))
        action = policy.sample()
        reward = (action == y).float()
        surrogate = -((reward - baseline) * policy.log_prob(action)).mean()
        baseline.mul_(0.95).add_(0.05 * reward.mean())
        optimizer.zero_grad()
        surrogate.backward()
        optimizer.step()
        missed: Tensor = 1 - reward.mean()
        return missed

    return Training(model, optimizer, step, 1500)


@healthy()
def embedding_sparse() -> Training:
    """Bigrams with a sparse embedding: most of its rows have no gradient in a step."""
    model = nn.Sequential(nn.Embedding(65, 16, sparse=True), nn.Flatten(), nn.Linear(16 * 8, 65))
    sparse = torch.optim.SparseAdam(list(model[0].parameters()), lr=3e-3)
    dense = torch.optim.Adam(model[2].parameters(), lr=3e-3)
    batches = passages(64, 8)

    def step(k: int) -> Tensor:
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y[:, -1])
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()
        return loss.detach()

    return Training(model, [sparse, dense], step, 800)
