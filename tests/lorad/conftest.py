"""Small layers and models that LoRaD's tests share."""

import peft
import pytest
import torch
from torch import Tensor, nn

from wadi.lorad import LoRaDConfig


class Toy(nn.Module):
    """A linear layer (odd fan-in), a grouped convolution and a linear head, in that order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lin = nn.Linear(9, 16)
        self.conv = nn.Conv2d(4, 6, 2, groups=2, padding=1)
        self.head = nn.Linear(54, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.lin(x)).unflatten(1, (4, 2, 2))
        return self.head(torch.relu(self.conv(hidden)).flatten(1))


def randomise(model: nn.Module, scale: float = 0.5, seed: int = 1) -> None:
    """Give every angle factor of ``model`` random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lorad_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def angles(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lorad_" in name]


@pytest.fixture
def adapted():
    """``adapted(**config) -> (PEFT model, input)`` with random angles."""

    def make(model: nn.Module | None = None, zero: bool = False, **config):
        settings = {"r": 3, "target_modules": ["lin", "conv", "head"], **config}
        wrapped = peft.get_peft_model(model or Toy(), LoRaDConfig(**settings))
        if not zero:
            randomise(wrapped)
        return wrapped, torch.randn(7, 9, generator=torch.Generator().manual_seed(2))

    return make
