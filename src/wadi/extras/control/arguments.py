"""Arguments for a call of a controlled pipeline: condition images at the right size, strengths, modes.

diffusers' pipelines name these arguments differently (``image``, ``control_image``, ...); the functions here know which.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wadi.backbones import from_pipeline
from wadi.errors import WadiError
from wadi.extras.control.condition_images import as_rgb, finished_condition, fit_image
from wadi.extras.control.families import IMAGE_PROMPT_PIPELINES, PIPELINES
from wadi.io.images import open_image

STRONGEST = 2.0


def control_arguments(
    pipeline: Any,
    image: Image.Image | str | Path | Sequence[Any],
    strength: float = 1.0,
    image_prompt: bool = False,
    mode: int | None = None,
) -> dict[str, Any]:
    """Return the arguments that a call of a controlled pipeline takes in addition to prompt and steps.

    Args:
        image: the condition image in any mode, one for all prompts or a list with one for each prompt. It is resized if its
            aspect ratio is that of the generated images. For an IP-Adapter: the image to resemble, of any size.
        strength: 0 (no control) to 2; the control was trained at 1.
        image_prompt: the image is for the IP-Adapter of a pipeline that also has a ControlNet.
        mode: number of the kind of condition, for a union ControlNet of FLUX, which knows several kinds.
    Raises:
        WadiError: if the strength is out of range, the image cannot be used, the pipeline has no control, or ``mode`` is
            missing or unknown to the ControlNet.
    """
    _check_strength(strength)
    is_list = isinstance(image, Sequence) and not isinstance(image, (str, Path))
    images = [_open(one) for one in (image if is_list else [image])]  # type: ignore[union-attr]
    name = type(pipeline).__name__
    for_adapter = image_prompt or name in IMAGE_PROMPT_PIPELINES
    if not images or (len(images) > 1 and for_adapter):
        raise WadiError(f"Received {len(images)} images. Give one, or one for each prompt; an IP-Adapter takes one.")
    if for_adapter:
        return _image_prompt_arguments(pipeline, images[0], strength)
    image_name, strength_name = _argument_names(pipeline)
    sized = [fit_image(finished_condition(one), from_pipeline(pipeline).resolution) for one in images]
    modes = _checked_modes(getattr(pipeline, "controlnet", None), [mode])
    call = {} if modes == [None] else {"control_mode": modes[0]}
    return {image_name: sized if is_list else sized[0], strength_name: float(strength), **call}


def _image_prompt_arguments(pipeline: Any, image: Image.Image, strength: float) -> dict[str, Any]:
    from wadi.extras.control.image_prompt import readable

    if getattr(pipeline, "image_encoder", None) is None:
        raise WadiError(f"This {type(pipeline).__name__} has no control. Give a pipeline that with_control() returned.")
    pipeline.set_ip_adapter_scale(float(strength))
    return {"ip_adapter_image": readable(as_rgb(image))}


def arguments_of_several(
    pipeline: Any,
    images: Sequence[Image.Image | str | Path],
    strengths: Sequence[float],
    image_prompts: Sequence[bool],
    modes: Sequence[int | None],
) -> dict[str, Any]:
    """Return `control_arguments` for the controls that `with_controls` received. Each list has one entry for each control.

    Raises:
        WadiError: as `control_arguments`.
    """
    controls = list(zip(images, strengths, modes, image_prompts, strict=True))
    nets = [(image, strength, mode) for image, strength, mode, is_prompt in controls if not is_prompt]
    call: dict[str, Any] = {}
    if len(nets) == 1:
        (image, strength, mode) = nets[0]
        call = control_arguments(pipeline, image, strength, mode=mode)
    elif nets:
        for _, strength, _ in nets:
            _check_strength(strength)
        image_name, strength_name = _argument_names(pipeline)
        checked = _checked_modes(pipeline.controlnet, [mode for _, _, mode in nets])
        size = from_pipeline(pipeline).resolution
        call = {
            image_name: [fit_image(finished_condition(_open(image)), size) for image, _, _ in nets],
            strength_name: [float(s) for _, s, _ in nets],
        }
        call |= {} if checked == [None] * len(nets) else {"control_mode": checked}
    for image, strength, mode, is_prompt in controls:
        if is_prompt:
            if mode is not None:
                raise WadiError(f"The mode {mode} was given for an IP-Adapter, which has no modes. Leave it out.")
            call |= control_arguments(pipeline, image, strength, image_prompt=True)
    return call


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= STRONGEST:
        raise WadiError(f"The strength of the control is {strength}. Give 0 (no effect) to {STRONGEST:g}; it was trained at 1.")


def _argument_names(pipeline: Any) -> tuple[str, str]:
    """Return the names of the call's arguments for the condition image and the strength."""
    name = type(pipeline).__name__
    if name not in PIPELINES.values():
        raise WadiError(f"This {name} has no control that is known here. Give a pipeline that with_control() returned.")
    parameters = inspect.signature(type(pipeline).__call__).parameters
    image = "control_image" if "control_image" in parameters else "image"
    adapter = "adapter_conditioning_scale" in parameters
    return image, "adapter_conditioning_scale" if adapter else "controlnet_conditioning_scale"


def _checked_modes(model: Any, modes: Sequence[int | None]) -> list[int | None]:
    """Return the modes of ControlNets after checking that each is within its ControlNet's number of modes.

    A ControlNet for one kind of condition takes None.
    """
    for net, mode in zip(getattr(model, "nets", [model]), modes, strict=True):
        count = getattr(net, "config", {}).get("num_mode") if getattr(net, "union", False) else None
        if count is None and mode is not None:
            raise WadiError(f"The mode {mode} was given for a control that knows one kind of condition. Leave it out.")
        if count is not None and (mode is None or not 0 <= mode < count):
            raise WadiError(
                f"This is a union ControlNet for {count} kinds of conditions, and the mode is {mode}. Give the number of the "
                f"condition's kind, 0 to {count - 1} (--control-mode; the model's page lists them: often 0 canny, 1 tile, 2 "
                "depth, 3 blur, 4 pose, 5 grey, 6 low quality)."
            )
    return list(modes)


def _open(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image, "Condition image")
