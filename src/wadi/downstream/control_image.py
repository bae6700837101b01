"""IP-Adapters: an image as part of the prompt, through diffusers' own attention processors (Ye et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.errors import WadiError
from wadi.io.regular import regular
from wadi.pretrained import load_complete

PARTS = ("image_proj", "ip_adapter")


def read_weights(file: Path) -> dict[str, dict[str, Tensor]]:
    """``{"image_proj": {...}, "ip_adapter": {...}}`` of an IP-Adapter's safetensors file.

    Raises:
        WadiError: if it is not there or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise WadiError(f"IP-Adapter {str(file)!r} does not exist. Expected its .safetensors file.")
    try:
        tensors = load_file(regular(file))
    except SafetensorError as error:
        raise WadiError(f"IP-Adapter {str(file)!r} cannot be read: {error}. Expected a safetensors file.") from error
    parts = {part: {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")} for part in PARTS}
    if not all(parts.values()):
        first = next(iter(tensors), "nothing")
        raise WadiError(
            f"{str(file)!r} is no IP-Adapter: it holds {first!r}, say. Expected tensors named image_proj.* and ip_adapter.*."
        )
    return parts


def refuse_misfit(unet: Any, weights: dict[str, dict[str, Tensor]]) -> None:
    """Raise `WadiError` unless there is one pair of keys and values for each cross-attention, each of its width."""
    wanted = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    keys = sorted((k for k in weights["ip_adapter"] if k.endswith("to_k_ip.weight")), key=lambda k: int(k.split(".")[0]))
    given = [weights["ip_adapter"][key].shape for key in keys]
    if given != wanted:
        raise WadiError(
            f"The IP-Adapter is of another family: it has {len(given)} key projections ({_shape(given)} the first), and this "
            f"model has {len(wanted)} cross-attentions ({_shape(wanted)}). Expected one that was trained for this model."
        )


def _shape(shapes: list[Any]) -> str:
    return " x ".join(str(side) for side in shapes[0]) if shapes else "none"


def add_image_prompt(pipeline: Any, file: Path) -> Any:
    """Load an IP-Adapter into ``pipeline``, in place; its ``image_encoder`` folder lies beside the file or one above.

    Raises:
        WadiError: if weights or encoder are not there, or belong to another family.
    """
    from transformers import CLIPVisionModelWithProjection

    weights = read_weights(file)
    refuse_misfit(pipeline.unet, weights)
    if getattr(pipeline, "image_encoder", None) is None:
        folder = next((f for f in (file.parent / "image_encoder", file.parent.parent / "image_encoder") if f.is_dir()), None)
        if folder is None:
            raise WadiError(f"There is no folder image_encoder beside {str(file)!r}. Expected the CLIP vision model it needs.")
        encoder: Any = load_complete(
            CLIPVisionModelWithProjection, str(folder), f"Image encoder {str(folder)!r}", dtype=pipeline.dtype
        )
        pipeline.register_modules(image_encoder=encoder.to(pipeline.device))
    if getattr(pipeline, "feature_extractor", None) is None:
        pipeline.register_modules(feature_extractor=_processor(pipeline.image_encoder.config.image_size))
    pipeline.load_ip_adapter(weights, subfolder="", weight_name=file.name)
    return pipeline


def _processor(size: int) -> Any:
    """CLIP's image processor; the one on PIL where there is one, which does without torchvision."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
