"""Which of diffusers' controlled pipelines belongs to which pair of pipeline and control."""

from __future__ import annotations

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
# class of a control -> class that holds several of them
SEVERAL = {
    "ControlNetModel": "MultiControlNetModel",
    "SD3ControlNetModel": "SD3MultiControlNetModel",
    "FluxControlNetModel": "FluxMultiControlNetModel",
}
# class of a controlled pipeline -> (component, setting, neutral value): a setting that it ignores and the plain pipeline obeys
IGNORED = {
    "StableDiffusionXLAdapterPipeline": ("vae", "latents_mean", None),
    "SanaControlNetPipeline": ("transformer", "timestep_scale", 1.0),
}
IMAGE_PROMPT_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def takes_image_prompt(pipeline_class: str) -> bool:
    """Return whether an IP-Adapter can be loaded into a pipeline of this class: a plain one, or one with a ControlNet."""
    with_controlnet = [
        new for (old, kind), new in PIPELINES.items() if old in IMAGE_PROMPT_PIPELINES and kind == "ControlNetModel"
    ]
    return pipeline_class in (*IMAGE_PROMPT_PIPELINES, *with_controlnet)
