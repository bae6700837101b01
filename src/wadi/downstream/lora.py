"""Adapters made for the many-step model, on its one-step student: applied by weight, so that nothing of them is left to carry.

A LoRA adds ``dW = s (alpha / r) B A`` to each weight ``W``; a LoRaD adapter turns it by ``s A B``. The student's weight is the
teacher's, turned by the student's own angles: ``W_s = rot(W, theta_s)``.

- LoRaD: ``rot(W_s, s theta)``. Both turn in the same planes, so the angles add and the order does not matter.
- LoRA: ``W_s + dW``, what diffusers' own loader does; or, given the student's adapter, ``rot(W + dW, theta_s) = W_s +
  rot(dW, theta_s)``: the customised teacher, distilled by the angles that the plain one was distilled by. The rotation is
  linear in the weight, so it is the change alone that is turned.

docs/dreambooth.md measures which keeps what.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi import adapters
from wadi.backbones import from_pipeline
from wadi.errors import WadiError

NAME = "customisation"
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the file in a folder
LARGEST = 4.0  # of a scale; sliders and the like stay below
_PART = re.compile(r"\.lora_(A|B)(\.\w+)?\.(weight|bias)$")


def apply_lora(pipeline: Any, file: str | Path, scale: float = 1.0, student: str | Path | None = None) -> int:
    """Put a style LoRA or a DreamBooth adapter into the weights of ``pipeline``, in place; returns how many layers changed.

    Made for a one-step pipeline (`wadi.generate.load`) and an adapter trained on its many-step teacher; any pipeline of a
    family with a LoRA loader will do. Afterwards the pipeline is an ordinary one: no adapter is attached, one more can be
    applied, ``save_pretrained`` writes what it draws with.

    Args:
        file: a LoRA as diffusers or kohya write it (``.safetensors``, or a folder with ``pytorch_lora_weights.safetensors``),
            or the folder of a LoRaD adapter made by `wadi dreambooth`.
        scale: of the change; 0 leaves the pipeline as it is, to the bit; from -4 to 4.
        student: adapter folder of the student that ``pipeline`` is: a LoRA is then turned by its angles along with the weight.
            For LoRaD the two are the same.
    Raises:
        WadiError: if the file is missing, damaged, of a kind that cannot be applied (DoRA, a pickle, a student's own adapter)
            or made for another model (which keys), or ``scale`` is out of range. The pipeline is then as it was.
    """
    check_scale(scale)
    path = find(file)
    backbone = from_pipeline(pipeline)
    adapters.refuse_adapted(backbone.network)
    if path.is_dir():
        return _turn(backbone.network, path, scale)
    loaded = _checked(pipeline, backbone.component, path)
    angles = None if student is None else angles_of(backbone.network, Path(student))
    if scale == 0:
        return len(loaded)
    try:
        _load(pipeline, path)
        if angles is None:
            pipeline.fuse_lora(lora_scale=scale)
        else:
            _fuse_turned(pipeline, backbone.component, scale, angles)
    finally:
        pipeline.unload_lora_weights()
    return len(loaded)


def check_scale(scale: float) -> None:
    """Raise `WadiError` if ``scale`` is none that an adapter can sensibly have."""
    if not math.isfinite(scale) or abs(scale) > LARGEST:
        raise WadiError(
            f"The scale of the LoRA is {scale}. Expected a number from {-LARGEST:g} to {LARGEST:g}; 1 is as it was trained, "
            "0 none of it."
        )


def find(file: str | Path) -> Path:
    """The LoRA's file, or the folder of a LoRaD adapter, that ``file`` names.

    Raises:
        WadiError: if there is none, or it is not one of these.
    """
    path = Path(file)
    if path.is_dir():
        if (path / FILE).is_file():
            return path / FILE
        if (path / adapters.CONFIG).is_file():
            return path
        raise WadiError(
            f"{str(path)!r} holds no adapter. Expected {FILE} (a LoRA) or {adapters.CONFIG} (LoRaD) in it, or the LoRA's own "
            ".safetensors file."
        )
    if not path.is_file():
        raise WadiError(f"LoRA {str(path)!r} does not exist. Expected a .safetensors file, or a folder of `wadi dreambooth`.")
    if path.suffix != ".safetensors":
        raise WadiError(
            f"LoRA {str(path)!r} is not a .safetensors file. Expected one: pickled weights (.bin, .pt, .ckpt) can run code "
            "when they are read; convert them."
        )
    return path


# --- LoRaD ------------------------------------------------------------------------------------------------------------------


def _turn(network: nn.Module, folder: Path, scale: float) -> int:
    """`rot(W, scale theta)` for every layer of a LoRaD adapter."""
    about = folder / "wadi.json"
    if about.is_file() and "timestep" in json.loads(about.read_text(encoding="utf-8")):
        raise WadiError(
            f"{str(folder)!r} is a student's own adapter. Expected a customisation (`wadi dreambooth`): to draw with this "
            "student give it as --adapter."
        )
    try:
        adapters.load(network, folder, NAME)
    except WadiError:
        _remove(network)
        raise
    _set_scale(network, scale)
    layers = sum(1 for _ in adapters.angles(network, NAME))
    adapters.fuse(network, NAME)
    return layers


def _remove(network: nn.Module) -> None:
    """Take a half-loaded adapter off again: no angle is added at scale 0, to the bit."""
    if adapters.parameters(network, NAME):
        _set_scale(network, 0.0)
        adapters.fuse(network, NAME)


def _set_scale(network: nn.Module, scale: float) -> None:
    for module in network.modules():
        if NAME in getattr(module, "lorad_A", {}):
            module.set_scale(NAME, scale)  # type: ignore[operator]


def angles_of(network: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Angles ``(out, fan_in // 2)`` by layer of a student's adapter folder that fits ``network``.

    Raises:
        WadiError: if it is none, or belongs to another architecture.
    """
    _, tensors = adapters.read(folder)
    found = {}
    for key in (key for key in tensors if key.endswith(".lorad_A")):
        layer = key.removeprefix("base_model.model.").removesuffix(".lorad_A")
        A, B = tensors[key].float(), tensors[key.removesuffix("A") + "B"].float()
        weight = getattr(_module(network, layer), "weight", None)
        if weight is None or (len(weight), weight[0].numel() // 2) != (len(A), B.shape[1]):
            raise WadiError(
                f"Student {str(folder)!r} is of another model: layer {layer!r} does not fit. Expected its own student."
            )
        found[layer] = (A @ B).to(weight.device)
    return found


# --- LoRA -------------------------------------------------------------------------------------------------------------------


def _checked(pipeline: Any, component: str, file: Path) -> set[str]:
    """Names of the layers that the LoRA in ``file`` changes in ``pipeline``, which is not touched.

    diffusers passes over keys that belong to no part of the pipeline, and some of those that fit no layer, with no more than a
    remark: the student would be drawn without its LoRA.
    """
    tensors = _read(pipeline, file)
    parts = list(getattr(pipeline, "_lora_loadable_modules", ()))
    lost, reshaped, layers = [], [], set()
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part not in parts or getattr(pipeline, part, None) is None:
            lost.append(key)
        elif part == component:
            layer, which = _PART.sub("", rest), _PART.search(rest)
            weight = getattr(_module(getattr(pipeline, part), layer), "weight", None)
            if which is None or weight is None:
                lost.append(key)
            elif which[3] == "weight" and _side(tensor, which[1]) != _side(weight, which[1]):
                reshaped.append(key)
            layers.add(f"{part}.{layer}")
        else:
            layers.add(f"{part}.{_PART.sub('', rest)}")  # the text encoder's own loader knows its old names
    told = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for keys, what in ((sorted(lost), "keys that fit no layer"), (sorted(reshaped), "of another shape"))
        if keys
    ]
    if told or not layers:
        raise WadiError(
            f"LoRA {str(file)!r} is for another base than this {type(pipeline).__name__}: {', '.join(told) or 'it is empty'} "
            f"of {len(tensors)}. Expected one trained on this model or its teacher."
        )
    return layers


def _side(tensor: Tensor, which: str) -> int:
    """Fan-in of ``A`` and of a weight seen from it, fan-out of ``B``."""
    return int(tensor.shape[1 if which == "A" else 0])


def _read(pipeline: Any, file: Path) -> Mapping[str, Tensor]:
    """The LoRA's tensors under diffusers' names, ``unet.LAYER.lora_A.weight`` and so on, whoever wrote them."""
    from safetensors import SafetensorError, safe_open

    if not hasattr(pipeline, "load_lora_weights"):
        raise WadiError(
            f"diffusers has no LoRA loader for {type(pipeline).__name__}. Expected a LoRaD adapter folder there (`wadi "
            "dreambooth --method lorad`), or the LoRA merged into the teacher."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise WadiError(f"LoRA {str(file)!r} is damaged: {error}. Expected a safetensors file.") from error
    if dora := [name for name in names if "dora_scale" in name or "lora_magnitude" in name]:
        raise WadiError(
            f"{str(file)!r} is a DoRA (it has {dora[0]}), whose norms diffusers drops. Expected a plain LoRA: merge it into "
            "the teacher instead."
        )
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        with _quiet():
            found = pipeline.lora_state_dict(str(file.parent), weight_name=file.name, **_hints(pipeline))
        tensors = found[0] if isinstance(found, tuple) else found
        if any("lora_A" not in name for name in tensors if name.startswith("unet.")):
            tensors = convert_unet_state_dict_to_peft(tensors)
    except Exception as error:
        raise WadiError(
            f"LoRA {str(file)!r} cannot be read for {type(pipeline).__name__} (first key: {names[0] if names else 'none'}): "
            f"{_first_line(error)}. Expected one trained on this model or its teacher."
        ) from error
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}


def _hints(pipeline: Any) -> dict[str, Any]:
    """SDXL's block numbers in kohya's files follow from the U-Net's config, as its own loader tells."""
    return {"unet_config": pipeline.unet.config} if "XL" in type(pipeline).__name__ else {}


def _load(pipeline: Any, file: Path) -> None:
    try:
        with _quiet():
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=NAME)
    except Exception as error:
        raise WadiError(
            f"LoRA {str(file)!r} does not fit this {type(pipeline).__name__}: {_first_line(error)}. Expected one trained on "
            "this model or its teacher."
        ) from error


@torch.no_grad()
def _fuse_turned(pipeline: Any, component: str, scale: float, angles: Mapping[str, Tensor]) -> None:
    """``W_s + scale rot(dW, theta_s)`` where the student has angles, ``W_s + scale dW`` elsewhere."""
    from wadi.lorad.rotation import rotate

    for part in pipeline._lora_loadable_modules:
        for name, layer in getattr(pipeline, part).named_modules() if getattr(pipeline, part, None) is not None else ():
            if NAME in getattr(layer, "lora_A", {}):
                weight, change = layer.get_base_layer().weight, layer.get_delta_weight(NAME).float()
                if part == component and name in angles:
                    change = rotate(change, angles[name])
                weight.copy_(weight.float() + scale * change)


def attach(network: nn.Module, rank: int, target_modules: str) -> list[nn.Parameter]:
    """Freeze ``network`` and put a LoRA on the layers whose whole name matches ``target_modules``; its parameters, float32.

    ``alpha`` is the rank. ``B`` is zero: the output does not change.

    Raises:
        WadiError: if nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules), network, adapter_name=NAME)
    except (ValueError, re.error) as error:
        raise WadiError(
            f"The LoRA could not be attached: {_first_line(error)} Expected target_modules to be a regular expression over "
            "names of Linear or Conv2d layers."
        ) from error
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def write(pipeline: Any, folder: Path) -> None:
    """Write the LoRA that `attach` put on the pipeline's network as diffusers does: ``load_lora_weights(folder)`` reads it.

    Raises:
        WadiError: if the pipeline's family has no LoRA format in diffusers.
    """
    from peft import get_peft_model_state_dict

    component = from_pipeline(pipeline).component
    if not hasattr(pipeline, "save_lora_weights"):
        raise WadiError(f"diffusers has no LoRA format for {type(pipeline).__name__}. Expected --method lorad or full.")
    tensors = get_peft_model_state_dict(getattr(pipeline, component), adapter_name=NAME)
    layers = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    type(pipeline).save_lora_weights(folder, **{f"{component}_lora_layers": layers})


# --- small ------------------------------------------------------------------------------------------------------------------


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


class _quiet:
    """Without diffusers' remarks on parts that a LoRA does not have: what does not fit was refused before."""

    def __enter__(self) -> None:
        from diffusers.utils import logging

        self.before = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from diffusers.utils import logging

        logging.set_verbosity(self.before)
