"""Small models that LoRaD's tests share."""

import peft
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
        for parameter in angles(model).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def angles(model: nn.Module, adapter: str = "") -> dict[str, nn.Parameter]:
    """The angle factors of ``model`` by name, of one adapter or of all."""
    named = model.named_parameters()
    return {name: p for name, p in named if "lorad_" in name and name.endswith(adapter)}


def gradients(model: nn.Module, adapter: str = "") -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in angles(model, adapter).values()]


def adapted(base: nn.Module | None = None, random: bool = True, **config):
    """A PEFT model on ``base`` (a Toy if None), every layer rotated at random unless ``random`` is False."""
    settings = {"r": 3, "target_modules": ["lin", "conv", "head"], **config}
    model = peft.get_peft_model(Toy() if base is None else base, LoRaDConfig(**settings))
    if random:
        randomise(model)
    return model


def inputs(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape or (7, 9), generator=torch.Generator().manual_seed(seed))


def rotated_layer(o: int = 12, i: int = 10, bias: bool = True, **config):
    """One LoRaD linear layer alone, at random angles."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(i, o, bias=bias)), target_modules=["0"], **config)
    return model.base_model.model[0]
