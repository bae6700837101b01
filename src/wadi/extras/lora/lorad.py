"""Rotate the weights of a network by a LoRaD adapter, and read the angles of a student."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from wadi import roles
from wadi.errors import WadiError
from wadi.extras.lora import ADAPTER_NAME
from wadi.lorad.pairing import NEIGHBOURS, stored_pairing
from wadi.lorad.stored import layer_factors, set_scale


def rotate_by_adapter(network: nn.Module, folder: Path, scale: float) -> int:
    """Replace each adapted weight by ``rot(W, scale theta)`` with the angles ``theta`` of the adapter in ``folder``.

    Returns:
        The number of layers.
    Raises:
        WadiError: if the adapter is damaged, belongs to another architecture, or is a student's own. The weights are then
            unchanged.
    """
    if roles.is_students(folder):
        raise WadiError(
            f"{str(folder)!r} is a student's own adapter. --lora takes a customisation (`wadi dreambooth`): to generate with "
            "this student give it as --adapter."
        )
    try:
        roles.load(network, folder, ADAPTER_NAME)
    except WadiError:
        _remove_adapter(network)
        raise
    set_scale(network, ADAPTER_NAME, scale)
    layers = len(roles.adapted_layers(network, ADAPTER_NAME))
    roles.fuse(network, ADAPTER_NAME)
    return layers


def _remove_adapter(network: nn.Module) -> None:
    """Remove an adapter that was attached but not loaded. Fusing at scale 0 leaves the weights unchanged, bit for bit."""
    if roles.parameters(network, ADAPTER_NAME):
        set_scale(network, ADAPTER_NAME, 0.0)
        roles.fuse(network, ADAPTER_NAME)


def student_angles(network: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the angles ``(out, fan_in // 2)`` of each layer of a student's adapter folder.

    Raises:
        WadiError: if the folder contains no LoRaD adapter, or one that does not fit ``network``, or whose pairs are not
            neighbours.
    """
    config, tensors = roles.read(folder)
    if (pairing := stored_pairing(config, str(folder))) != NEIGHBOURS:
        raise WadiError(
            f"Student {str(folder)!r} rotates pairs of the kind {pairing!r}. Only a student with pairing {NEIGHBOURS!r} can be "
            "combined with a LoRA in this way."
        )
    angles = {}
    for layer, (A, B) in layer_factors(tensors).items():
        weight = getattr(find_layer(network, layer), "weight", None)
        if weight is None or (len(weight), weight[0].numel() // 2) != (len(A), B.shape[1]):
            raise WadiError(
                f"Student {str(folder)!r} belongs to another model: its layer {layer!r} does not fit. Give the adapter of the "
                "student that is loaded."
            )
        angles[layer] = (A.float() @ B.float()).to(weight.device)
    return angles


def find_layer(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of this name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
