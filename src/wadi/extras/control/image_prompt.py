"""Load IP-Adapters: an image as part of the prompt, through diffusers' own attention processors (Ye et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from wadi.backbones.weight_files import TRANSFORMERS, file_names, weight_copies
from wadi.errors import WadiError, first_line
from wadi.io.records import read_json
from wadi.io.tensors import PICKLE_REMEDY, PICKLE_SUFFIXES, read_tensors
from wadi.io.weight_checks import first_names, load_complete

PUBLISHED = ("models", "sdxl_models")  # folders of the published repository
LONGEST = 20  # ratio of an image's sides
SMALLEST, LARGEST_SIDE = 32, 4096  # pixels a side
PARTS = ("image_proj", "ip_adapter")


def read_weights(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read ``{"image_proj": {...}, "ip_adapter": {...}}`` from an IP-Adapter's safetensors file.

    Raises:
        WadiError: if it does not exist, contains something else, has NaN or infinite values, or is a FaceID adapter.
    """
    tensors, _ = read_tensors(file, "IP-Adapter")
    parts = {part: {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")} for part in PARTS}
    if not all(parts.values()):
        first = next(iter(tensors), "nothing")
        raise WadiError(
            f"{str(file)!r} is not an IP-Adapter: its first tensor is {first!r}. An IP-Adapter has tensors named image_proj.* "
            "and ip_adapter.*."
        )
    face = "perceiver_resampler.proj_in.weight" in parts["image_proj"] or (
        "proj.2.weight" in parts["image_proj"] and ("norm.weight" in parts["image_proj"])
    )
    if face or any(".to_q_lora." in name for name in parts["ip_adapter"]):
        raise WadiError(
            f"{str(file)!r} is a FaceID IP-Adapter, which reads the embeddings of a face recognition network (insightface). "
            "That is not supported: use ip-adapter-plus-face or another IP-Adapter without FaceID in its name."
        )
    return parts


def width_of(weights: dict[str, dict[str, Tensor]]) -> tuple[str, int]:
    """Return ``(config entry, width)`` of the image encoder's output that the adapter reads.

    The entry is ``projection_dim`` for the projected embedding and ``hidden_size`` for hidden states.

    Raises:
        WadiError: if its image projection is of an unknown kind.
    """
    shapes = {name: tensor.shape for name, tensor in weights["image_proj"].items()}
    for name, entry, side in (
        ("proj.weight", "projection_dim", -1), ("proj.0.weight", "hidden_size", 0), ("proj_in.weight", "hidden_size", -1),
    ):  # fmt: skip
        if name in shapes and len(shapes[name]) == 2:
            return entry, int(shapes[name][side])
    raise WadiError(
        f"The IP-Adapter's image projection has the tensors {first_names(list(shapes))}, which is an unknown kind. Use an "
        "IP-Adapter of the plain, Plus or Full kind."
    )


def check_adapter_fits(unet: Any, weights: dict[str, dict[str, Tensor]]) -> None:
    """Raise `WadiError` unless the adapter has a pair of projections for each cross-attention, with its shape."""
    needed = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    keys = sorted((k for k in weights["ip_adapter"] if k.endswith("to_k_ip.weight")), key=lambda k: int(k.split(".")[0]))
    shapes = [weights["ip_adapter"][key].shape for key in keys]
    if shapes != needed:
        raise WadiError(
            f"The IP-Adapter does not fit this model: it has {len(shapes)} key projections (the first {_shape(shapes)}), and "
            f"the model has {len(needed)} cross-attentions ({_shape(needed)}). Use one that was trained for this model."
        )


def _shape(shapes: list[Any]) -> str:
    return " x ".join(str(side) for side in shapes[0]) if shapes else "none"


def add_image_prompt(pipeline: Any, file: Path, image_encoder: str | Path | None = None) -> Any:
    """Load an IP-Adapter into ``pipeline``, in place.

    Args:
        image_encoder: folder of the CLIP vision model; None = see `find_encoder`.
    Raises:
        WadiError: if weights or encoder are missing, incomplete, or do not fit the model.
    """
    weights = read_weights(file)
    check_adapter_fits(pipeline.unet, weights)
    entry, width = width_of(weights)
    if getattr(pipeline, "image_encoder", None) is None or image_encoder is not None:
        folder = find_encoder(file, entry, width) if image_encoder is None else Path(image_encoder)
        encoder = load_encoder(folder, pipeline.dtype)
        pipeline.register_modules(image_encoder=encoder.to(pipeline.device))
    encoder_width = getattr(pipeline.image_encoder.config, entry, None)
    if encoder_width != width:
        raise WadiError(
            f"The IP-Adapter {str(file)!r} needs an image encoder with {entry} {width}, and this one has {encoder_width}. Give "
            "the right one by --image-encoder (files named vit-h use models/image_encoder, other SDXL files "
            "sdxl_models/image_encoder)."
        )
    if getattr(pipeline, "feature_extractor", None) is None:
        pipeline.register_modules(feature_extractor=_processor(pipeline.image_encoder.config.image_size))
    try:
        pipeline.load_ip_adapter(weights, subfolder="", weight_name=file.name)
    except Exception as error:  # tensors of the image projection that are missing or of another shape
        raise WadiError(
            f"IP-Adapter {str(file)!r} could not be loaded: {first_line(error)}. Download or save it again."
        ) from error
    return pipeline


def find_encoder(file: Path, entry: str, width: int) -> Path:
    """Return the folder ``image_encoder`` near an IP-Adapter's file whose config has ``entry`` equal to ``width``.

    The search covers the file's folder, its parent, and ``models`` and ``sdxl_models`` next to the file's folder: the
    published repository keeps an encoder in each of these two, and a file in one may need the encoder in the other.

    Raises:
        WadiError: if no encoder is near, or none has this width.
    """
    above = file.resolve().parent
    near = [above / "image_encoder", above.parent / "image_encoder"]
    near += [above.parent / name / "image_encoder" for name in PUBLISHED]
    folders = [folder for folder in dict.fromkeys(near) if (folder / "config.json").is_file()]
    widths: dict[Path, Any] = {}
    for folder in folders:
        try:
            widths[folder] = read_json(folder / "config.json", dict[str, Any]).get(entry)
        except WadiError:
            widths[folder] = None
    for folder, encoder_width in widths.items():
        if encoder_width == width:
            return folder
    if not folders:
        raise WadiError(
            f"No folder image_encoder is near {str(file)!r}. Give the CLIP vision model that it needs ({entry} "
            f"{width}) by --image-encoder."
        )
    encoders = ", ".join(f"{str(folder)!r} ({entry} {encoder_width})" for folder, encoder_width in widths.items())
    raise WadiError(
        f"The IP-Adapter {str(file)!r} needs an image encoder with {entry} {width}. Near it are {encoders}. Give the right one "
        "by --image-encoder."
    )


def load_encoder(folder: Path, dtype: Any) -> Any:
    """Load a CLIP vision model with all its tensors.

    Raises:
        WadiError: if it does not exist, is a pickle, damaged or incomplete, or has NaN or infinite values.
    """
    from transformers import CLIPVisionModelWithProjection

    what = f"Image encoder {str(folder)!r}"
    if not (folder / "config.json").is_file():
        raise WadiError(f"{what} does not exist or has no config.json. Give the folder of a CLIP vision model.")
    names = file_names(folder)
    variants = weight_copies(names, TRANSFORMERS)
    if not variants:
        pickled = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
        raise WadiError(
            f"{what} has {f'its weights only as {pickled}. {PICKLE_REMEDY}' if pickled else 'no .safetensors weights.'}"
        )
    variant = None if None in variants else min(str(name) for name in variants)
    try:
        return load_complete(
            CLIPVisionModelWithProjection, str(folder), what, dtype=dtype, use_safetensors=True, variant=variant
        )
    except WadiError:
        raise
    except Exception as error:  # transformers and safetensors have exception classes of their own
        raise WadiError(f"{what} could not be loaded: {first_line(error)}. Download or save it again.") from error


def readable(image: Image.Image) -> Image.Image:
    """Return ``image`` at a size that CLIP's processor can handle: from `SMALLEST` to `LARGEST_SIDE` pixels a side.

    Raises:
        WadiError: if one side is more than `LONGEST` times the other: the processor would need too much memory.
    """
    short, long = sorted(image.size)
    if long > LONGEST * short:
        raise WadiError(f"The image is {image.width} x {image.height}. An IP-Adapter takes sides up to 1:{LONGEST}: crop it.")
    if short < SMALLEST:
        factor = SMALLEST / short
        return image.resize((round(image.width * factor), round(image.height * factor)))
    if long > LARGEST_SIDE:
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def _processor(size: int) -> Any:
    """Return CLIP's image processor, in the version on PIL if there is one, because it does not need torchvision."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
