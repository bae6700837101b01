"""Controlled one-step pictures: a pipeline and a ControlNet, T2I-Adapter or IP-Adapter in, diffusers' own pipeline out.

    student = wadi.generate.load(...)                                   # rotation merged, scheduler set
    pipeline = with_control(student, "zoo")                             # StableDiffusionControlNetPipeline
    edges = conditions.canny(conditions.read_picture("cat.png"))
    more = control_arguments(pipeline, edges, strength=0.8)             # {"image": ..., "controlnet_conditioning_scale": 0.8}
    pipeline("cat face", num_inference_steps=1, guidance_scale=0.0, **more)

The control may be ``'zoo'`` (the embedded teacher's ControlNet on edges), a folder or Hub id of a ControlNet or T2I-Adapter, or
the safetensors file of an IP-Adapter. The student's scheduler goes with it: one step is still one evaluation of the network.
`wadi.backbones.from_pipeline` knows the new pipeline, so ``wadi.generate.draw`` takes it like any other, given these arguments
for its calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wadi.backbones import from_pipeline
from wadi.backbones.loading import register_family
from wadi.backbones.stored import weights_in
from wadi.downstream.conditions import as_rgb, finished, fitted
from wadi.downstream.control_fit import refuse_misfit
from wadi.embedded import NAME, embedded
from wadi.errors import WadiError
from wadi.io.images import open_image
from wadi.io.records import read_json
from wadi.pretrained import load_complete
from wadi.progress import without_remarks

STRONGEST = 2.0

# (class of the pipeline, class of the control) -> class of the controlled pipeline
PIPELINES = {
    ("StableDiffusionPipeline", "ControlNetModel"): "StableDiffusionControlNetPipeline",
    ("StableDiffusionXLPipeline", "ControlNetModel"): "StableDiffusionXLControlNetPipeline",
    ("StableDiffusion3Pipeline", "SD3ControlNetModel"): "StableDiffusion3ControlNetPipeline",
    ("FluxPipeline", "FluxControlNetModel"): "FluxControlNetPipeline",
    ("SanaPipeline", "SanaControlNetModel"): "SanaControlNetPipeline",
    ("StableDiffusionPipeline", "T2IAdapter"): "StableDiffusionAdapterPipeline",
    ("StableDiffusionXLPipeline", "T2IAdapter"): "StableDiffusionXLAdapterPipeline",
}
IP_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def with_control(pipeline: Any, control: str | Path | Any) -> Any:
    """``pipeline`` under a control, as diffusers' own pipeline for it; weights and scheduler are shared, not copied.

    Args:
        pipeline: a loaded text-to-image pipeline, of a student (`wadi.generate.load`) or a teacher; for an IP-Adapter also
            one that is under another control already.
        control: ``'zoo'``, folder or Hub id of a ControlNet or T2I-Adapter, safetensors file of an
            IP-Adapter (its ``image_encoder`` folder beside it), or a loaded ControlNet or T2I-Adapter.
    Returns:
        A new pipeline; with an IP-Adapter ``pipeline`` itself, whose attention then listens to an image too.
    Raises:
        WadiError: if the control is not there, belongs to another family, or diffusers has no pipeline for the two.
    """
    if isinstance(control, (str, Path)) and str(control).endswith(".safetensors"):
        from wadi.downstream.control_image import add_image_prompt

        if not _takes_images(type(pipeline).__name__):
            raise _no_pipeline(pipeline, "an IP-Adapter")
        return add_image_prompt(pipeline, Path(control))
    model = load_control(control, pipeline.dtype) if isinstance(control, (str, Path)) else control
    kind = type(model).__name__
    found = PIPELINES.get((type(pipeline).__name__, kind))
    if found is None:
        raise _no_pipeline(pipeline, f"a {kind}")
    refuse_misfit(pipeline, model)
    return _switched(pipeline, found, "adapter" if kind == "T2IAdapter" else "controlnet", model)


def _takes_images(name: str) -> bool:
    """Whether an IP-Adapter goes into pipelines of class ``name``: a plain one, or one under a ControlNet."""
    controlled = [new for (old, kind), new in PIPELINES.items() if old in IP_PIPELINES and kind == "ControlNetModel"]
    return name in (*IP_PIPELINES, *controlled)


def _no_pipeline(pipeline: Any, control: str) -> WadiError:
    known = sorted({old for old, _ in PIPELINES})
    return WadiError(
        f"{type(pipeline).__name__} cannot be put under {control}: diffusers has no pipeline of the two, or it is not offered "
        f"here. Expected a control of the model's own family, and one of {', '.join(known)}."
    )


def _switched(pipeline: Any, name: str, argument: str, model: Any) -> Any:
    import diffusers

    backbone = from_pipeline(pipeline)
    new_class = getattr(diffusers, name)
    given: dict[str, Any] = {}
    if "requires_safety_checker" in inspect.signature(new_class.__init__).parameters:
        given["requires_safety_checker"] = False
    with without_remarks("diffusers"):  # it remarks on every cast, also to the dtype that is there already
        given[argument] = model.to(device=backbone.device, dtype=pipeline.dtype).eval()
        made = new_class.from_pipe(pipeline, dtype=pipeline.dtype, **given)  # float32 unless told
    made.set_progress_bar_config(disable=True)
    register_family(name, f"{type(backbone).__module__}:{type(backbone).__qualname__}")
    return made


def load_control(control: str | Path, dtype: Any = None) -> Any:
    """A ControlNet or T2I-Adapter from a folder or Hub id, by the class that its ``config.json`` names.

    Raises:
        WadiError: if it is not there, or its config names something else.
    """
    path = embedded("controlnet") if str(control) == NAME else control
    kinds = {kind for _, kind in PIPELINES}
    try:
        import diffusers
        from diffusers import ControlNetModel

        if Path(path).is_dir():
            config = read_json(Path(path) / "config.json", dict[str, Any], "Control config")
        else:
            _refuse_missing(path)
            config = ControlNetModel.load_config(str(path))
        kind = str(config.get("_class_name"))
        if kind not in kinds:
            raise ValueError(f"its config.json names {kind!r}")
        options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
        if Path(path).is_dir():
            options["variant"] = weights_in(Path(path)).variant
        return load_complete(getattr(diffusers, kind), str(path), f"Control {str(control)!r}", use_safetensors=True, **options)
    except WadiError:
        raise
    except Exception as error:  # diffusers, huggingface_hub and safetensors have exception classes of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WadiError(
            f"Control {str(control)!r} could not be loaded: {first}. Expected 'zoo', the folder or Hub id of a "
            f"{' / '.join(sorted(kinds))}, or an IP-Adapter's .safetensors file."
        ) from error


def _refuse_missing(path: str | Path) -> None:
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise WadiError(f"Control {str(path)!r} does not exist. Expected a folder, or a Hub id 'owner/name'.")


def control_arguments(
    pipeline: Any, picture: Image.Image | str | Path | Sequence[Any], strength: float = 1.0, image_prompt: bool = False
) -> dict[str, Any]:
    """What to pass to a call of a controlled pipeline, besides prompt and steps.

    Args:
        picture: the condition image (any mode; resized where it has the drawing's aspect ratio), one for all prompts or a list
            with one for each; for an IP-Adapter the image to resemble, of any size.
        strength: 0 (no control) to 2; 1 is what the control was trained for.
        image_prompt: the picture is for the IP-Adapter of a pipeline that is under a ControlNet as well.
    Raises:
        WadiError: if the strength is out of range, the picture cannot be used, or the pipeline is under no control.
    """
    if not 0 <= strength <= STRONGEST:
        raise WadiError(f"The strength of the control is {strength}. Expected 0 (none) to {STRONGEST:g}; 1 is as trained.")
    many = isinstance(picture, Sequence) and not isinstance(picture, (str, Path))
    pictures = [_opened(one) for one in (picture if many else [picture])]  # type: ignore[union-attr]
    if not pictures or (len(pictures) > 1 and (image_prompt or type(pipeline).__name__ in IP_PIPELINES)):
        raise WadiError(f"Received {len(pictures)} pictures. Expected one, or one for each prompt; an IP-Adapter takes one.")
    name = type(pipeline).__name__
    if image_prompt or name in IP_PIPELINES:
        if getattr(pipeline, "image_encoder", None) is None:
            raise WadiError(f"This {name} is under no control. Expected what with_control() gives.")
        pipeline.set_ip_adapter_scale(float(strength))
        return {"ip_adapter_image": as_rgb(pictures[0])}
    if name not in PIPELINES.values():
        raise WadiError(f"A {name} is under no control that is known here. Expected what with_control() gives.")
    sized = [fitted(finished(one), from_pipeline(pipeline).resolution) for one in pictures]
    takes = inspect.signature(type(pipeline).__call__).parameters
    image = "control_image" if "control_image" in takes else "image"
    scale = "adapter_conditioning_scale" if "adapter_conditioning_scale" in takes else "controlnet_conditioning_scale"
    return {image: sized if many else sized[0], scale: float(strength)}


def _opened(picture: Any) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else open_image(picture, "Condition image")
