"""Open the networks to be compared, in any form, as mappings from names to tensors that are read on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones.lazy_tensors import LazyTensors, network_weights
from wadi.backbones.weight_files import split_variant
from wadi.errors import WadiError
from wadi.lorad.pairing import stored_pairing, with_partners_together
from wadi.lorad.rotation import Factor, pair_angles, rotate
from wadi.lorad.stored import PEFT_PREFIX
from wadi.roles import methods
from wadi.zoo.paths import NAME as ZOO
from wadi.zoo.paths import embedded_path, resolve_teacher


class RotatedLayer(NamedTuple):
    """A layer and its rotation by a LoRaD adapter."""

    W: Tensor  # the teacher's, float32
    R: Tensor  # rotated, float32
    factor: Factor
    theta: Tensor  # (out, fan_in // 2)


class AdaptedNetwork(Mapping[str, Tensor]):
    """A network with a LoRaD adapter. Each weight is rotated on access, in float32, and not kept.

    Raises:
        WadiError: on construction, if the adapter is damaged, of another kind, or does not fit ``base``.
    """

    def __init__(self, base: LazyTensors, folder: Path) -> None:
        config = roles.read_config(folder)
        roles.check_lorad(folder, config)
        self.pairing = stored_pairing(config, str(folder))
        self.base, self.stored = base, LazyTensors([folder / roles.WEIGHTS])
        names = {key: key.removeprefix(PEFT_PREFIX).rpartition(".lorad_") for key in self.stored}
        if unknown := sorted(key for key, (layer, _, end) in names.items() if not layer or end not in ("A", "B")):
            raise WadiError(f"Adapter {str(folder)!r} contains {unknown[0]!r}. Only angles (lorad_A, lorad_B) can be read.")
        self._keys = {(layer, end): key for key, (layer, _, end) in names.items()}
        for layer in {layer for layer, _ in self._keys}:
            self._check(layer, folder)

    def _check(self, layer: str, folder: Path) -> None:
        name = f"{layer}.weight"
        shape = self.base.shape(name) if name in self.base else None
        A, B = (self.stored.shape(self._keys[layer, end]) if (layer, end) in self._keys else None for end in "AB")
        pairs = torch.Size(shape[1:]).numel() // 2 if shape else 0
        if not shape or not A or not B or (A[0], B[1], A[1]) != (shape[0], pairs, B[0]):
            in_teacher = f"a weight of shape {tuple(shape)}" if shape else "no such layer"
            raise WadiError(
                f"Adapter {str(folder)!r} does not fit the teacher at {layer!r}: A {A} and B {B}, but the teacher has "
                f"{in_teacher}. Give the teacher that it was trained on."
            )

    def rotated_layer(self, name: str) -> RotatedLayer | None:
        """Return the layer of the weight ``name`` and its angles, or None where the adapter has none."""
        layer = name.removesuffix(".weight")
        if (layer, "A") not in self._keys or not name.endswith(".weight"):
            return None
        A, B = (self.stored[self._keys[layer, end]] for end in "AB")
        factor, W = Factor(A, B, 1.0), self.base[name].float()
        theta = pair_angles([factor])
        R = with_partners_together(lambda W: rotate(W, theta), W, self.pairing)
        return RotatedLayer(W, R, factor, theta)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.base.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        layer = self.rotated_layer(name)
        return self.base[name] if layer is None else layer.R

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class MergedNetwork(Mapping[str, Tensor]):
    """A network with an adapter of another method than LoRaD. PEFT merges each layer on access, in float32; none is kept.

    Raises:
        WadiError: on construction, if the adapter's method is unknown or the teacher lacks one of its layers; on access, if a
            layer does not fit.
    """

    def __init__(self, base: LazyTensors, folder: Path) -> None:
        self.base, self.stored, self.source = base, LazyTensors([folder / roles.WEIGHTS]), repr(str(folder))
        self.config = methods.stored_config(roles.read_config(folder), self.source)
        self.keys_of: dict[str, list[str]] = {}
        for key in self.stored:
            self.keys_of.setdefault(roles.layer_of(key), []).append(key)
        if missing := sorted(layer for layer in self.keys_of if f"{layer}.weight" not in base):
            raise WadiError(
                f"Adapter {self.source} does not fit the teacher, which has no layer {missing[0]!r}. Give the teacher that it "
                "was trained on."
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.base.shape(name)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in self.keys_of or part not in ("weight", "bias"):
            return self.base[name]
        network = _only_layer(layer, self.base)
        roles.attach(network, "student", self.config)
        roles.restore(network, "student", {key: self.stored[key] for key in self.keys_of[layer]}, self.source)
        return roles.fuse(network, "student").state_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def _only_layer(name: str, base: LazyTensors) -> nn.Module:
    """Return a network that has nothing but the layer ``name``, in float32."""
    W, has_bias = base[f"{name}.weight"].float(), f"{name}.bias" in base
    out, fan_in, *kernel = W.shape
    plain = nn.Conv2d(fan_in, out, (kernel[0], kernel[1]), bias=has_bias) if kernel else nn.Linear(fan_in, out, bias=has_bias)
    plain.weight.data = W
    if plain.bias is not None:
        plain.bias.data = base[f"{name}.bias"].float()
    layer: nn.Module = plain
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, layer)
        layer = parent
    return layer


class LoadedNetwork(Mapping[str, Tensor]):
    """A network in memory. Its tensors are the network's own, so writing to them changes it."""

    def __init__(self, network: nn.Module) -> None:
        self.tensors = network.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.tensors[name].shape)


Network = LazyTensors | AdaptedNetwork | MergedNetwork | LoadedNetwork


def open_teacher(name: str) -> LazyTensors:
    """Open the network of a pipeline folder, a Hub id, a safetensors file, or 'zoo'.

    Raises:
        WadiError: if it is none of these, or cannot be read.
    """
    path = Path(name)
    if path.is_dir() and adapter_folder(name) is not None:
        raise WadiError(
            f"Teacher {name!r} is a run or an adapter. Give a pipeline folder or Hub id, a .safetensors state dict, or zoo."
        )
    return _open_weights(resolve_teacher(name), "Teacher")


def open_student(name: str, teacher: LazyTensors) -> Network:
    """Open a student: anything that `open_teacher` opens, or a run or adapter folder, which is applied to ``teacher``.

    'zoo' is the embedded student.

    Raises:
        WadiError: if it is none of these, cannot be read, or is an adapter that does not fit ``teacher``.
    """
    folder = adapter_folder(name)
    if folder is None:
        return _open_weights(name, "Student")
    is_lorad = roles.read_config(folder).get("peft_type") == "LORAD"
    return AdaptedNetwork(teacher, folder) if is_lorad else MergedNetwork(teacher, folder)


def adapter_folder(name: str) -> Path | None:
    """Return the adapter's folder of a run, an adapter folder or 'zoo', and None for anything else.

    Raises:
        WadiError: if it is a run without a student.
    """
    path = embedded_path("student") if name == ZOO else Path(name)
    if (path / "config.yaml").is_file() and not (path / "model_index.json").is_file():
        if not (path / "student").is_dir():
            raise WadiError(f"Run {name!r} has not saved a student yet. Give a finished or interrupted run.")
        return path / "student"
    return path if (path / roles.CONFIG).is_file() else None


def _open_weights(name: str, role: str) -> LazyTensors:
    """Open the network of a pipeline or a safetensors file. ``role`` ('Teacher' or 'Student') starts the error messages."""
    path = Path(split_variant(name)[0])
    if path.is_file() and path.suffix != ".safetensors":
        raise WadiError(
            f"{role} {name!r} is not a .safetensors file. Load it with the library that wrote it and save it as .safetensors. "
            "(Pickled weights are never opened: they can run code.)"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise WadiError(
            f"{role} {name!r} is a folder without model_index.json, config.yaml or {roles.CONFIG}. Give a pipeline folder, a "
            "run, or an adapter folder."
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".safetensors")):
        raise WadiError(f"{role} {name!r} does not exist. Give a folder, a .safetensors file, a Hub id 'owner/name' or zoo.")
    return network_weights(name)
