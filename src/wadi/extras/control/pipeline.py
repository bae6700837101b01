"""Put a ControlNet, T2I-Adapter or IP-Adapter on a pipeline. The result is diffusers' own controlled pipeline.

    student = wadi.load()                                               # the embedded student; or any run or export
    pipeline = with_control(student, "zoo")                             # a StableDiffusionControlNetPipeline
    edges = condition("canny", Image.open("cat.png"))
    more = control_arguments(pipeline, edges, strength=0.8)             # {"image": ..., "controlnet_conditioning_scale": 0.8}
    pipeline("cat face", num_inference_steps=1, guidance_scale=0.0, **more)

The control may be ``'zoo'`` (the embedded teacher's ControlNet for edges), a folder or Hub id of a ControlNet or T2I-Adapter,
the safetensors file of a ControlNet, or that of an IP-Adapter. The new pipeline keeps the student's scheduler, so one step is
still one evaluation of the network. `wadi.backbones.from_pipeline` knows the new pipeline, so `wadi.pipelines.generate` takes
it like any other, with these arguments for its calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wadi.backbones import from_pipeline
from wadi.backbones.registry import register_family
from wadi.errors import WadiError
from wadi.extras.control.arguments import arguments_of_several, control_arguments
from wadi.extras.control.families import IGNORED, PIPELINES, SEVERAL, takes_image_prompt
from wadi.extras.control.fit import check_control_fits
from wadi.extras.control.load import is_image_prompt, load_control
from wadi.io.quiet import errors_only

__all__ = ["arguments_of_several", "control_arguments", "is_image_prompt", "load_control", "with_control", "with_controls"]


def with_control(pipeline: Any, control: str | Path | Any, image_encoder: str | Path | None = None) -> Any:
    """Return ``pipeline`` with a control, as diffusers' own pipeline for it. Weights and scheduler are shared, not copied.

    Args:
        pipeline: a loaded text-to-image pipeline, of a student (`wadi.load`) or a teacher. For an IP-Adapter it may have a
            ControlNet already.
        control: ``'zoo'``, a folder or Hub id of a ControlNet or T2I-Adapter, the safetensors file of a ControlNet with its
            ``config.json`` next to it, the safetensors file of an IP-Adapter, or a loaded ControlNet or T2I-Adapter.
        image_encoder: folder of the CLIP vision model of an IP-Adapter; None = search near its file, see
            `wadi.extras.control.image_prompt.find_encoder`.
    Returns:
        A new pipeline. With an IP-Adapter it is ``pipeline`` itself, whose attention then also takes an image.
    Raises:
        WadiError: if the control does not exist, does not fit the model, or diffusers has no pipeline for the two.
    """
    return with_controls(pipeline, [control], image_encoder)


def with_controls(pipeline: Any, controls: Sequence[str | Path | Any], image_encoder: str | Path | None = None) -> Any:
    """Return ``pipeline`` with several controls: ControlNets of one class, and an IP-Adapter.

    Args and Raises: as `with_control`.
    """
    models: list[Any] = []
    adapters: list[Path] = []
    for control in controls:
        if is_image_prompt(control):
            adapters.append(Path(control))
        else:
            models.append(load_control(control, pipeline.dtype) if isinstance(control, (str, Path)) else control)
    kinds = sorted({type(model).__name__ for model in models})
    _check_image_prompts(pipeline, adapters, kinds)
    if models:
        pipeline = _with_models(pipeline, models, kinds)
    if adapters:
        from wadi.extras.control.image_prompt import add_image_prompt

        pipeline = add_image_prompt(pipeline, adapters[0], image_encoder)
    return pipeline


def _check_image_prompts(pipeline: Any, adapters: Sequence[Path], kinds: Sequence[str]) -> None:
    """Raise `WadiError` unless there is at most one IP-Adapter, and pipeline and other controls (``kinds``) allow it."""
    if len(adapters) > 1:
        raise WadiError(
            f"Received {len(adapters)} IP-Adapters: {', '.join(map(str, adapters))}. Only one image can be part of the prompt: "
            "give one."
        )
    if adapters and not takes_image_prompt(type(pipeline).__name__):
        raise _no_pipeline(pipeline, "an IP-Adapter")
    if adapters and kinds == ["T2IAdapter"]:
        raise WadiError(
            "Received a T2I-Adapter and an IP-Adapter, which cannot be combined. Use a ControlNet with the IP-Adapter."
        )


def _with_models(pipeline: Any, models: list[Any], kinds: Sequence[str]) -> Any:
    """Return diffusers' controlled pipeline for ControlNets or a T2I-Adapter, whose classes are ``kinds``."""
    new_class = PIPELINES.get((type(pipeline).__name__, kinds[0])) if len(kinds) == 1 else None
    if new_class is None:
        raise _no_pipeline(pipeline, f"a {' and a '.join(kinds)}")
    for model in models:
        check_control_fits(pipeline, model)
    model = models[0] if len(models) == 1 else _joined(kinds[0], models)
    _check_settings(pipeline, new_class)
    return _converted(pipeline, new_class, "adapter" if kinds == ["T2IAdapter"] else "controlnet", model)


def _check_settings(pipeline: Any, new_class: str) -> None:
    """Raise `WadiError` if diffusers' controlled pipeline would generate other images than the plain one without control."""
    component, setting, neutral = IGNORED.get(new_class, ("", "", None))
    value = getattr(pipeline, component).config.get(setting) if component else neutral
    if value != neutral:
        raise WadiError(
            f"diffusers' {new_class} ignores {setting} ({value}) of this model's {component}, so its images would be wrong. "
            "Use another kind of control for this model."
        )


def _joined(kind: str, models: list[Any]) -> Any:
    """Return ControlNets of one class as one model whose residuals are their sum."""
    import diffusers

    if kind not in SEVERAL:
        raise WadiError(
            f"Received {len(models)} controls of class {kind}, but diffusers takes only one. Give one, or ControlNets of the "
            f"class {' or '.join(sorted(SEVERAL))}."
        )
    return getattr(diffusers, SEVERAL[kind])(models)


def _no_pipeline(pipeline: Any, control: str) -> WadiError:
    known = sorted({old for old, _ in PIPELINES})
    return WadiError(
        f"{type(pipeline).__name__} cannot be combined with {control}: diffusers has no pipeline for the two, or this package "
        f"does not support it. Give a control of the model's own family. Pipelines that take a control: {', '.join(known)}."
    )


def _converted(pipeline: Any, new_class: str, argument: str, model: Any) -> Any:
    """Return a pipeline of class ``new_class`` with the components of ``pipeline`` and ``model`` as its ``argument``."""
    import diffusers

    backbone = from_pipeline(pipeline)
    controlled_class = getattr(diffusers, new_class)
    components: dict[str, Any] = {}
    if "requires_safety_checker" in inspect.signature(controlled_class.__init__).parameters:
        components["requires_safety_checker"] = False
    with errors_only("diffusers"):  # it warns about every cast, also to the dtype that the model has already
        components[argument] = model.to(device=backbone.device, dtype=pipeline.dtype).eval()
        # from_pipe casts to float32 unless a dtype is given
        controlled = controlled_class.from_pipe(pipeline, dtype=pipeline.dtype, **components)
    controlled.set_progress_bar_config(disable=True)
    register_family(new_class, type(backbone))
    return controlled
