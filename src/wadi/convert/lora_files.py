"""Write the LoRA or DoRA of a student as ordinary LoRA files, for diffusers and for ComfyUI.

- ``pytorch_lora_weights.safetensors``: diffusers' format. The LoRA's config is in the file's metadata.
- ``comfyui/lora.safetensors``: the same numbers under the names that ComfyUI reads. For a U-Net these are kohya's names
  (``lora_unet_mid_block_..._to_q.lora_down.weight``), for a transformer diffusers' names with ``.alpha`` added. ComfyUI does
  not read the metadata: without ``.alpha`` it would use a strength of 1. DoRA has no such file: ComfyUI divides by the norm of
  ``W``, PEFT by that of ``W + dW``, so the images would differ.

ComfyUI's names are those of its ``comfy/lora.py`` and ``comfy/weight_adapter/lora.py``; its DoRA is ``weight_decompose`` in
``comfy/weight_adapter/base.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi import roles
from wadi.backbones import Backbone
from wadi.backbones.saving import call_text
from wadi.errors import WadiError
from wadi.io.patterns import matching_names
from wadi.io.weight_checks import first_names
from wadi.lorad.stored import PEFT_PREFIX

COMFYUI = "comfyui/lora.safetensors"
MERGED = "Export the merged pipeline instead: --to diffusers."
# Starting values of a LoRA that leave the teacher's weights as they are. Others (PiSSA, OLoRA, ...) subtract from the weights.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", None)
_TENSORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Lora:
    """The LoRA of one layer: ``dW = alpha / rank * B A``. With a magnitude, DoRA rescales the rows of ``W + dW`` to it.

    Attributes:
        A: ``(rank, in)``, or ``(rank, in, height, width)`` for a convolution.
        B: ``(out, rank)``, or ``(out, rank, 1, 1)``.
        alpha: such that ``alpha / rank`` is the scale, also where PEFT divides by the root of the rank (rsLoRA).
        magnitude: ``out`` numbers in the shape that PEFT gives them; None without DoRA.
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of ``A``."""
        return len(self.A)


def read_loras(folder: Path) -> dict[str, Lora]:
    """Return ``{layer: LoRA}`` of an adapter folder.

    Raises:
        WadiError: if the folder is damaged, or its adapter is not of the form that `Lora` describes.
    """
    config, tensors = roles.read(folder)
    named = f"Adapter {str(folder)!r}"
    if config.get("peft_type") != "LORA":
        raise WadiError(
            f"{named} is of type {config.get('peft_type')!r}. A LoRA file can only contain the matrices of a LoRA or DoRA "
            f"('LORA'). {MERGED}"
        )
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise WadiError(
            f"{named} was trained with init_lora_weights {config['init_lora_weights']!r}, which also changes the teacher's "
            f"weights. A LoRA file has no place for that. {MERGED}"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        layer, _, rest = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        part = _TENSORS.get(f"lora_{rest}")
        if layer and part:
            parts.setdefault(layer, {})[part] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise WadiError(f"{named} has tensors that a LoRA file has no place for: {first_names(unknown)}. {MERGED}")
    if not parts:
        raise WadiError(f"{named} contains no LoRA. Restore the folder as it was written.")
    alphas = _alphas(config, list(parts), named)
    expected = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    loras = {}
    for layer, found in parts.items():
        if set(found) != expected or found["A"].ndim not in (2, 4) or found["B"].ndim != found["A"].ndim:
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            raise WadiError(f"{named} is damaged: layer {layer!r} has {shapes}. It must have {sorted(expected)}, all of them.")
        rank = len(found["A"])
        if rank == 0 or found["B"].shape[1] != rank:
            raise WadiError(f"{named} is damaged: in layer {layer!r} A has rank {rank}, but B has {found['B'].shape[1]}.")
        alpha = alphas[layer] * (math.sqrt(rank) if config.get("use_rslora") else 1)
        loras[layer] = Lora(found["A"], found["B"], alpha, found.get("magnitude"))
    return loras


def _alphas(config: Mapping[str, Any], layers: list[str], named: str) -> dict[str, float]:
    """Return the alpha of each layer. If several patterns match a layer, the first one counts, as in PEFT."""
    alphas: dict[str, Any] = dict.fromkeys(layers, config.get("lora_alpha"))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise WadiError(f"{named} has alpha_pattern {patterns!r:.100}. It must map names of layers to numbers.")
    for pattern, alpha in reversed(patterns.items()):
        alphas |= dict.fromkeys(matching_names(rf"(.*\.)?({pattern})", layers, "alpha_pattern"), alpha)
    for layer, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise WadiError(f"{named} has lora_alpha {alpha!r} for layer {layer!r}. It must be a number.")
    return alphas


def metadata(loras: Mapping[str, Lora]) -> dict[str, Any]:
    """Return the config of ``loras`` for diffusers' loader. It names each layer in full: no shorter name matches another."""
    first = next(iter(loras.values()))
    exact = {layer: f"^{re.escape(layer)}" for layer in loras}
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {exact[layer]: lora.rank for layer, lora in loras.items() if lora.rank != first.rank},
        "alpha_pattern": {exact[layer]: lora.alpha for layer, lora in loras.items() if lora.alpha != first.alpha},
        "target_modules": "|".join(map(re.escape, loras)),
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
        "bias": "none",
    }


def diffusers_tensors(loras: Mapping[str, Lora]) -> dict[str, Tensor]:
    """Return the tensors as diffusers' ``save_lora_weights`` takes them."""
    tensors: dict[str, Tensor] = {}
    for layer, lora in loras.items():
        tensors |= {f"{layer}.lora_A.weight": lora.A, f"{layer}.lora_B.weight": lora.B}
        if lora.magnitude is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = lora.magnitude
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def comfyui_tensors(loras: Mapping[str, Lora], component: str) -> dict[str, Tensor]:
    """Return the tensors under the names that ComfyUI reads: kohya's for a ``unet``, diffusers' for a ``transformer``."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    matrices = {}
    for layer, lora in loras.items():
        matrices[f"{component}.{layer}.lora_A.weight"] = lora.A.contiguous()
        matrices[f"{component}.{layer}.lora_B.weight"] = lora.B.contiguous()
    tensors = convert_state_dict_to_kohya(matrices) if component == "unet" else matrices
    for layer, lora in loras.items():
        name = f"lora_unet_{layer.replace('.', '_')}" if component == "unet" else f"{component}.{layer}"
        tensors[f"{name}.alpha"] = torch.tensor(float(lora.alpha))  # diffusers writes the rank here
    return tensors


def check_has_loader(backbone: Backbone) -> None:
    """Raise `WadiError` if diffusers has no LoRA loader for the family."""
    if not hasattr(backbone.pipeline, "save_lora_weights"):
        raise WadiError(f"diffusers cannot load a LoRA into a {type(backbone.pipeline).__name__}. {MERGED}")


def write_lora_tensors(backbone: Backbone, loras: Mapping[str, Lora], folder: Path) -> None:
    """Write the LoRA of a student into ``folder``, for diffusers and, unless it is a DoRA, for ComfyUI.

    Args:
        backbone: of the teacher, or of the student with merged weights.
    Raises:
        WadiError: if diffusers has no LoRA loader for the family, or a layer does not fit the network.
    """
    from safetensors.torch import save_file

    pipeline, component = backbone.pipeline, backbone.component
    check_has_loader(backbone)
    check_fits(backbone.network, loras)
    type(pipeline).save_lora_weights(
        folder,
        **{f"{component}_lora_layers": diffusers_tensors(loras), f"{component}_lora_adapter_metadata": metadata(loras)},
    )
    if not any(lora.magnitude is not None for lora in loras.values()):
        (folder / COMFYUI).parent.mkdir()
        save_file(comfyui_tensors(loras, component), folder / COMFYUI, metadata={"format": "pt"})


def check_fits(network: torch.nn.Module, loras: Mapping[str, Lora]) -> None:
    """Raise `WadiError` if a LoRA has another shape than the layer of ``network`` that it changes."""
    weights = {
        name: module.weight for name, module in network.named_modules() if isinstance(getattr(module, "weight", None), Tensor)
    }
    for layer, lora in loras.items():
        weight = weights.get(layer)
        if weight is None or (len(lora.B), *lora.A.shape[1:]) != tuple(weight.shape):
            has = "no such layer" if weight is None else f"a weight of {tuple(weight.shape)} there"
            raise WadiError(
                f"The student's LoRA of layer {layer!r} does not fit the teacher, which has {has}. Give the teacher that the "
                "student was trained on."
            )


def loading_lines(backbone: Backbone, scheduler: Any, steps: int, load: str = "pipe.load_lora_weights(FOLDER)") -> str:
    """Return Python code that loads the files from ``FOLDER`` into the pipeline ``TEACHER`` and generates ``prompt``.

    Args:
        load: the line that loads the adapter.
    """
    pipeline, name = type(backbone.pipeline).__name__, type(scheduler).__name__
    return (
        f"from diffusers import {', '.join(sorted((name, pipeline)))}\n\n"
        f"pipe = {pipeline}.from_pretrained(TEACHER)\n"
        f"{load}\n"
        f'pipe.scheduler = {name}.from_pretrained(FOLDER, subfolder="scheduler")\n'
        f"image = pipe({call_text(backbone, steps)}).images[0]\n"
    )
