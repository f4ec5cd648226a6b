"""Networks of the published cases, built from their layer lists out of ordinary modules.

Modules are made and initialised in the order of the list, so a seed gives the weights with which the specification's
`observed` numbers were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spec = Mapping[str, Any]


class Exponential(nn.Module):
    """Keras' `exponential` activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "exponential": Exponential,
    "softmax": lambda: nn.Softmax(dim=1),
}


#: Scheme to what fills a tensor, given the number in its name, fan-in and fan-out.
SCHEMES: dict[str, Callable[[Tensor, float, int, int], object]] = {
    "zeros": lambda w, number, n, m: w.zero_(),
    "ones": lambda w, number, n, m: w.fill_(1.0),
    "const": lambda w, number, n, m: w.fill_(number),
    "normal": lambda w, number, n, m: w.normal_(0, number),
    "trunc": lambda w, number, n, m: nn.init.trunc_normal_(w, 0, number, -2 * number, 2 * number),
    "uniform": lambda w, number, n, m: w.uniform_(-number, number),
    "glorot_uniform": lambda w, number, n, m: _symmetric(w, math.sqrt(6 / (n + m))),
    "he_uniform": lambda w, number, n, m: _symmetric(w, math.sqrt(6 / n)),
    "he_normal": lambda w, number, n, m: w.normal_(0, math.sqrt(2 / n)),
    "lecun_normal": lambda w, number, n, m: w.normal_(0, math.sqrt(1 / n)),
    "mf": lambda w, number, n, m: w.normal_(0, math.sqrt(number / n)),
    "torch": lambda w, number, n, m: _symmetric(w, 1 / math.sqrt(n)),
}


@torch.no_grad()
def initialize(tensor: Tensor, scheme: str | None, *, fan_in: int, fan_out: int) -> None:
    """Fill `tensor` by a scheme's name: `he_uniform`, `normal:0.05`, `mf:1.76` (variance x fan-in); None: zeros."""
    name, _, number = (scheme or "zeros").partition(":")
    SCHEMES[name](tensor, float(number or 0), fan_in, fan_out)


def _symmetric(tensor: Tensor, limit: float) -> None:
    tensor.uniform_(-limit, limit)


class SequentialBuilder:
    """Adds layers one by one and follows the shape of one sample through them."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = list(shape)
        self.modules: list[nn.Module] = []
        self.penalised: list[tuple[Tensor, float]] = []

    def add(self, layer: Spec) -> None:
        getattr(self, "_" + layer["t"])(layer)

    def _weights(self, module: nn.Linear | nn.Conv2d, layer: Spec, *, fan_in: int, fan_out: int) -> None:
        initialize(module.weight, layer["w"], fan_in=fan_in, fan_out=fan_out)
        if module.bias is not None:
            initialize(module.bias, layer["b"], fan_in=fan_in, fan_out=fan_out)
        if layer.get("l2"):
            self.penalised.append((module.weight, layer["l2"]))
        self.modules.append(module)
        self._act(layer)

    def _act(self, layer: Spec) -> None:
        if layer["act"] != "linear":
            self.modules.append(ACTIVATIONS[layer["act"]]())

    def _dense(self, layer: Spec) -> None:
        size, width = math.prod(self.shape), layer["n"]
        self._weights(nn.Linear(size, width, bias=layer["b"] is not None), layer, fan_in=size, fan_out=width)
        self.shape = [width]

    def _conv(self, layer: Spec) -> None:
        channels, width, kernel, same = self.shape[0], layer["n"], layer["k"], layer.get("pad") == "same"
        module = nn.Conv2d(channels, width, kernel, padding=kernel // 2 if same else 0)
        self._weights(module, layer, fan_in=channels * kernel**2, fan_out=width * kernel**2)
        self.shape = [width, *(size if same else size - kernel + 1 for size in self.shape[1:])]

    def _maxpool(self, layer: Spec) -> None:
        self.modules.append(nn.MaxPool2d(layer["k"]))
        self.shape = [self.shape[0], *(size // layer["k"] for size in self.shape[1:])]

    def _flatten(self, layer: Spec) -> None:
        self.modules.append(nn.Flatten())
        self.shape = [math.prod(self.shape)]

    def _dropout(self, layer: Spec) -> None:
        self.modules.append(nn.Dropout(layer["p"]))

    def _bn(self, layer: Spec) -> None:
        self.modules.append(nn.BatchNorm1d(self.shape[0]))

    def _rnn(self, layer: Spec) -> None:
        width = layer["n"]
        make = LastState if layer["cell"] == "lstm" else PlainRecurrence
        self.modules.append(make(self.shape[-1], layer))
        self.shape = [width]

    def _vae(self, layer: Spec) -> None:
        self.modules.append(VariationalAutoencoder(self.shape[0], hidden=layer["h"], latent=layer["z"]))


class PlainRecurrence(nn.Module):
    """h = act(U x_t + W h), with W orthogonal times `rho`: its spectral radius is exactly `rho`."""

    def __init__(self, size: int, layer: Spec) -> None:
        super().__init__()
        width = layer["n"]
        self.input = nn.Linear(size, width)
        self.recurrent = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.recurrent.weight)
        self.recurrent.weight.data.mul_(layer["rho"])
        self.activation = ACTIVATIONS[layer["act"]]()

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.recurrent.in_features)
        for now in self.input(x).unbind(1):
            state = self.activation(now + self.recurrent(state))
        return state


class LastState(nn.Module):
    """The last output of an LSTM whose forget bias starts at 1 (Jozefowicz et al. 2015)."""

    def __init__(self, size: int, layer: Spec) -> None:
        super().__init__()
        width = layer["n"]
        self.lstm = nn.LSTM(size, width, batch_first=True)
        with torch.no_grad():
            dict(self.lstm.named_parameters())["bias_ih_l0"][width : 2 * width] = 1

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return states[:, -1]


class VariationalAutoencoder(nn.Module):
    """One hidden layer each way (Kingma & Welling 2014); gives the picture, mean and log variance."""

    def __init__(self, size: int, *, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(size, hidden)
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.decoder = nn.Linear(latent, hidden)
        self.output = nn.Linear(hidden, size)
        self.relu = nn.ReLU()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.relu(self.encoder(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.sigmoid(self.output(self.relu(self.decoder(code)))), mean, log_variance


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, 2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.down(self.gelu(self.up(self.norm2(x))))
        return out


class CharacterModel(nn.Module):
    """A small GPT over characters, its output tied to its embedding, all matrices N(0, `std`)."""

    def __init__(
        self, vocabulary: int, *, width: int, heads: int, layers: int, context: int, std: float = 0.02
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, std)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position(torch.arange(codes.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sequential(layers: Sequence[Spec], shape: Sequence[int]) -> tuple[nn.Module, list[tuple[Tensor, float]]]:
    """The network of a layer list for samples of `shape`, and its weights that have an L2 penalty, with its factor."""
    builder = SequentialBuilder(shape)
    for layer in layers:
        builder.add(layer)
    return nn.Sequential(*builder.modules), builder.penalised
