"""The models whose step time is measured: steps from a millisecond up, from ten tensors to a thousand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Case:
    """One model with its batch.

    Args:
        name: As in the table.
        build: Makes the model.
        batch: Makes inputs and targets.
        loss: Of outputs and targets.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18 (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        shape_changes = stride != 1 or inside != outside
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if shape_changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def resnet(width: int = 32) -> nn.Module:
    """ResNet-18's shape at half its width, for 32x32 pictures: 60 tensors."""
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage in range(4):
        for i in range(2):
            outside = width * 2**stage
            blocks.append(Block(inside, outside, 2 if stage and not i else 1))
            inside = outside
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


class Transformer(nn.Module):
    """Twelve layers of 128 over 64 tokens, as in GPT-2 but narrow: 150 tensors."""

    def __init__(self, layers: int = 12, width: int = 128, words: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Any:
        """Logits of shape (batch, words, tokens)."""
        return self.head(self.norm(self.layers(self.embed(tokens)))).transpose(1, 2)


class Recurrent(nn.Module):
    """Two LSTM layers of 128 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, 2, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        """Logits from the last state."""
        return self.head(self.lstm(x)[0][:, -1])


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank 4, as in LoRA (Hu et al. 2022)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return x + 0.1 * torch.tanh(self.base(x) + self.up(self.down(x)))


def mlp(layers: int = 100, width: int = 64) -> nn.Module:
    """Many small layers: the worst case for anything that looks at every tensor.

    Initialised after He et al. 2015; with torch's default the gradients of the first layers would be too small to be
    numbers, and slow ones.
    """
    parts: list[nn.Module] = []
    for _ in range(layers):
        layer = nn.Linear(width, width)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts)


def _pictures() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 32, 32), torch.randint(10, (16,))


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (8, 64))
    return tokens, tokens.roll(-1, 1)


CASES = {
    case.name: case
    for case in (
        Case("transformer", Transformer, _tokens, functional.cross_entropy),
        Case("mlp", mlp, lambda: (torch.randn(512, 64), torch.randn(512, 64)), functional.mse_loss),
        Case("cnn", resnet, _pictures, functional.cross_entropy),
        Case("lstm", Recurrent, lambda: (torch.randn(16, 32, 64), torch.randint(10, (16,))), functional.cross_entropy),
        Case(
            "lora",
            lambda: nn.Sequential(*[Adapted() for _ in range(500)]),
            lambda: (torch.randn(64, 64), torch.randn(64, 64)),
            functional.mse_loss,
        ),
        Case(
            "tiny",
            lambda: nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(64, 64), nn.Tanh())]),
            lambda: (torch.randn(256, 64), torch.randn(256, 64)),
            functional.mse_loss,
        ),
    )
}
