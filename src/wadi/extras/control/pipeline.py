"""Controlled one-step images: a pipeline and a ControlNet, T2I-Adapter or IP-Adapter in, diffusers' own pipeline out.

    student = wadi.load(...)                                   # rotation merged, scheduler set
    pipeline = with_control(student, "zoo")                             # StableDiffusionControlNetPipeline
    edges = conditions.canny(conditions.read_picture("cat.png"))
    more = control_arguments(pipeline, edges, strength=0.8)             # {"image": ..., "controlnet_conditioning_scale": 0.8}
    pipeline("cat face", num_inference_steps=1, guidance_scale=0.0, **more)

The control may be ``'zoo'`` (the embedded teacher's ControlNet on edges), a folder or Hub id of a ControlNet or T2I-Adapter,
the safetensors file of a ControlNet, or that of an IP-Adapter. The student's scheduler goes with it: one step is one evaluation
of the network. `wadi.backbones.from_pipeline` knows the new pipeline, so `wadi.pipelines.generate.generate_images` takes it
like any other, given these arguments for its calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wadi.backbones import from_pipeline
from wadi.backbones.registry import register_family
from wadi.errors import WadiError
from wadi.extras.control.conditions import as_rgb, finished, fitted
from wadi.extras.control.fit import refuse_misfit
from wadi.extras.control.load import is_image_prompt, load_control
from wadi.io.images import open_image
from wadi.io.quiet import errors_only

__all__ = ["arguments_of_several", "control_arguments", "is_image_prompt", "load_control", "with_control", "with_controls"]

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
# class of a control -> class of several of them
SEVERAL = {
    "ControlNetModel": "MultiControlNetModel",
    "SD3ControlNetModel": "SD3MultiControlNetModel",
    "FluxControlNetModel": "FluxMultiControlNetModel",
}
# class of a controlled pipeline -> (component, setting, value) that it ignores, while the plain pipeline of the family obeys it
IGNORED = {
    "StableDiffusionXLAdapterPipeline": ("vae", "latents_mean", None),
    "SanaControlNetPipeline": ("transformer", "timestep_scale", 1.0),
}
IP_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def with_control(pipeline: Any, control: str | Path | Any, image_encoder: str | Path | None = None) -> Any:
    """``pipeline`` under a control, as diffusers' own pipeline for it; weights and scheduler are shared, not copied.

    Args:
        pipeline: a loaded text-to-image pipeline, of a student (`wadi.load`) or a teacher; for an IP-Adapter also
            one that is under another control already.
        control: ``'zoo'``, folder or Hub id of a ControlNet or T2I-Adapter, the safetensors file of a ControlNet with its
            ``config.json`` next to it, the safetensors file of an IP-Adapter, or a loaded ControlNet or T2I-Adapter.
        image_encoder: folder of the CLIP vision model of an IP-Adapter; None = found near its file, see
            `wadi.extras.control.image_prompt.find_encoder`.
    Returns:
        A new pipeline; with an IP-Adapter ``pipeline`` itself, whose attention then listens to an image too.
    Raises:
        WadiError: if the control is not there, belongs to another family, or diffusers has no pipeline for the two.
    """
    return with_controls(pipeline, [control], image_encoder)


def with_controls(pipeline: Any, controls: Sequence[str | Path | Any], image_encoder: str | Path | None = None) -> Any:
    """``pipeline`` under several controls at once: ControlNets of one kind, and an IP-Adapter.

    Args and Raises: as `with_control`.
    """
    models: list[Any] = []
    files: list[Path] = []
    for control in controls:
        if is_image_prompt(control):
            files.append(Path(control))
        else:
            models.append(load_control(control, pipeline.dtype) if isinstance(control, (str, Path)) else control)
    if len(files) > 1:
        raise WadiError(
            f"Received {len(files)} IP-Adapters: {', '.join(map(str, files))}. One image can be the prompt: give one."
        )
    if files and not _takes_images(type(pipeline).__name__):
        raise _no_pipeline(pipeline, "an IP-Adapter")
    kinds = sorted({type(model).__name__ for model in models})
    if files and kinds == ["T2IAdapter"]:
        raise WadiError(
            "Received a T2I-Adapter and an IP-Adapter, which do not go together. Use a ControlNet with the IP-Adapter."
        )
    if models:
        new = PIPELINES.get((type(pipeline).__name__, kinds[0])) if len(kinds) == 1 else None
        if new is None:
            raise _no_pipeline(pipeline, f"a {' and a '.join(kinds)}")
        for model in models:
            refuse_misfit(pipeline, model)
        model = models[0] if len(models) == 1 else _several(kinds[0], models)
        _refuse_ignored(pipeline, new)
        pipeline = _switched(pipeline, new, "adapter" if kinds == ["T2IAdapter"] else "controlnet", model)
    if files:
        from wadi.extras.control.image_prompt import add_image_prompt

        pipeline = add_image_prompt(pipeline, files[0], image_encoder)
    return pipeline


def _refuse_ignored(pipeline: Any, new: str) -> None:
    """Raise `WadiError` if diffusers' controlled pipeline would give other images than the plain one, even without control."""
    component, setting, neutral = IGNORED.get(new, ("", "", None))
    value = getattr(pipeline, component).config.get(setting) if component else neutral
    if value != neutral:
        raise WadiError(
            f"diffusers' {new} ignores {setting} ({value}) of this model's {component}, so that its images would be wrong. Use "
            "another kind of control for this model."
        )


def _several(kind: str, models: list[Any]) -> Any:
    """ControlNets as one model whose residuals are their sum."""
    import diffusers

    if kind not in SEVERAL:
        raise WadiError(
            f"Received {len(models)} controls of kind {kind}, of which diffusers takes one. Give one, or ControlNets of "
            f"{', '.join(sorted(SEVERAL))}."
        )
    return getattr(diffusers, SEVERAL[kind])(models)


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
    with errors_only("diffusers"):  # it remarks on every cast, also to the dtype that is there already
        given[argument] = model.to(device=backbone.device, dtype=pipeline.dtype).eval()
        made = new_class.from_pipe(pipeline, dtype=pipeline.dtype, **given)  # float32 unless told
    made.set_progress_bar_config(disable=True)
    register_family(name, f"{type(backbone).__module__}:{type(backbone).__qualname__}")
    return made


def control_arguments(
    pipeline: Any,
    picture: Image.Image | str | Path | Sequence[Any],
    strength: float = 1.0,
    image_prompt: bool = False,
    mode: int | None = None,
) -> dict[str, Any]:
    """What to pass to a call of a controlled pipeline, besides prompt and steps.

    Args:
        picture: the condition image (any mode; resized where it has the aspect ratio of the images), one for all prompts or a
            list with one for each; for an IP-Adapter the image to resemble, of any size.
        strength: 0 (no control) to 2; 1 is what the control was trained for.
        image_prompt: the picture is for the IP-Adapter of a pipeline that is under a ControlNet as well.
        mode: number of the condition's kind, for a union ControlNet of FLUX, which knows several.
    Raises:
        WadiError: if the strength is out of range, the picture cannot be used, the pipeline is under no control, or ``mode`` is
            missing or not one of the ControlNet's.
    """
    _refuse_strength(strength)
    many = isinstance(picture, Sequence) and not isinstance(picture, (str, Path))
    pictures = [_opened(one) for one in (picture if many else [picture])]  # type: ignore[union-attr]
    name = type(pipeline).__name__
    if not pictures or (len(pictures) > 1 and (image_prompt or name in IP_PIPELINES)):
        raise WadiError(f"Received {len(pictures)} pictures. Expected one, or one for each prompt; an IP-Adapter takes one.")
    if image_prompt or name in IP_PIPELINES:
        if getattr(pipeline, "image_encoder", None) is None:
            raise WadiError(f"This {name} is under no control. Expected what with_control() gives.")
        from wadi.extras.control.image_prompt import readable

        pipeline.set_ip_adapter_scale(float(strength))
        return {"ip_adapter_image": readable(as_rgb(pictures[0]))}
    image, scale = _names(pipeline)
    sized = [fitted(finished(one), from_pipeline(pipeline).resolution) for one in pictures]
    modes = _modes(getattr(pipeline, "controlnet", None), [mode])
    call = {} if modes == [None] else {"control_mode": modes[0]}
    return {image: sized if many else sized[0], scale: float(strength), **call}


def arguments_of_several(
    pipeline: Any,
    pictures: Sequence[Image.Image | str | Path],
    strengths: Sequence[float],
    image_prompts: Sequence[bool],
    modes: Sequence[int | None],
) -> dict[str, Any]:
    """`control_arguments` for the controls that were given to `with_controls`, with one entry of each list per control.

    Raises:
        WadiError: as `control_arguments`.
    """
    each = list(zip(pictures, strengths, modes, image_prompts, strict=True))
    nets = [(picture, strength, mode) for picture, strength, mode, prompt in each if not prompt]
    call: dict[str, Any] = {}
    if len(nets) == 1:
        (picture, strength, mode) = nets[0]
        call = control_arguments(pipeline, picture, strength, mode=mode)
    elif nets:
        for _, strength, _ in nets:
            _refuse_strength(strength)
        image, scale = _names(pipeline)
        found = _modes(pipeline.controlnet, [mode for _, _, mode in nets])
        size = from_pipeline(pipeline).resolution
        call = {
            image: [fitted(finished(_opened(picture)), size) for picture, _, _ in nets],
            scale: [float(s) for _, s, _ in nets],
        }
        call |= {} if found == [None] * len(nets) else {"control_mode": found}
    for picture, strength, mode, prompt in each:
        if prompt:
            if mode is not None:
                raise WadiError(f"The mode {mode} was given to an IP-Adapter, which has none. Leave it out.")
            call |= control_arguments(pipeline, picture, strength, image_prompt=True)
    return call


def _refuse_strength(strength: float) -> None:
    if not 0 <= strength <= STRONGEST:
        raise WadiError(f"The strength of the control is {strength}. Expected 0 (none) to {STRONGEST:g}; 1 is as trained.")


def _names(pipeline: Any) -> tuple[str, str]:
    """Names of the call's arguments for condition image and strength."""
    name = type(pipeline).__name__
    if name not in PIPELINES.values():
        raise WadiError(f"A {name} is under no control that is known here. Expected what with_control() gives.")
    takes = inspect.signature(type(pipeline).__call__).parameters
    image = "control_image" if "control_image" in takes else "image"
    return image, "adapter_conditioning_scale" if "adapter_conditioning_scale" in takes else "controlnet_conditioning_scale"


def _modes(model: Any, modes: Sequence[int | None]) -> list[int | None]:
    """``modes`` of ControlNets, checked against how many each knows; None for those that know one kind of condition."""
    for net, mode in zip(getattr(model, "nets", [model]), modes, strict=True):
        count = getattr(net, "config", {}).get("num_mode") if getattr(net, "union", False) else None
        if count is None and mode is not None:
            raise WadiError(f"The mode {mode} was given to a control that knows one kind of condition. Leave it out.")
        if count is not None and (mode is None or not 0 <= mode < count):
            raise WadiError(
                f"This is a union ControlNet, for {count} kinds of conditions, and the mode is {mode}. Give the number of the "
                f"condition's kind, 0 to {count - 1} (--control_mode; the model's page lists them: often 0 canny, 1 tile, 2 "
                "depth, 3 blur, 4 pose, 5 grey, 6 low quality)."
            )
    return list(modes)


def _opened(picture: Any) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else open_image(picture, "Condition image")
