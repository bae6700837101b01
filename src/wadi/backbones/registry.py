"""Find the backbone of a pipeline, by the name of the pipeline's class."""

from __future__ import annotations

from typing import Any

from wadi.backbones.base import Backbone
from wadi.errors import WadiError, first_line
from wadi.io.imports import imported

# Pipeline class name -> "module:class" of its backbone. Imported on use, so that nobody imports the families they do not use.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "wadi.backbones.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "wadi.backbones.sdxl:StableDiffusionXL",
    "PixArtAlphaPipeline": "wadi.backbones.pixart:PixArt",
    "PixArtSigmaPipeline": "wadi.backbones.pixart:PixArt",
    "StableDiffusion3Pipeline": "wadi.backbones.sd3:StableDiffusion3",
    "FluxPipeline": "wadi.backbones.flux:Flux",
    "SanaPipeline": "wadi.backbones.sana:Sana",
}


def register_family(pipeline_class: str, backbone: str) -> None:
    """Use ``backbone``, given as ``"module:class"``, for pipelines of class ``pipeline_class``."""
    FAMILIES[pipeline_class] = backbone


def family(pipeline_class: str) -> type[Backbone]:
    """Return the backbone class for pipelines of class ``pipeline_class``.

    Raises:
        WadiError: if there is none.
    """
    if pipeline_class not in FAMILIES:
        raise WadiError(
            f"The teacher is a {pipeline_class}, which is not supported. Supported are {', '.join(sorted(FAMILIES))}. A new "
            "family needs one file: see docs/add-a-family.md."
        )
    backbone: type[Backbone] = imported(FAMILIES[pipeline_class])
    return backbone


def from_pipeline(pipeline: Any, resolution: tuple[int, int] | None = None) -> Backbone:
    """Return the backbone of a loaded pipeline, at ``resolution`` ``(height, width)`` in pixels, or at the model's own.

    Raises:
        WadiError: if no family supports the pipeline's class, its scheduler is of an unknown kind, its configuration has values
            that cannot be used, or the model cannot generate at that resolution.
    """
    backbone = family(type(pipeline).__name__)
    try:
        return backbone(pipeline, resolution)
    except WadiError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise WadiError(
            f"The configuration of this {type(pipeline).__name__} cannot be used: {type(error).__name__}: {first_line(error)}. "
            "Compare the config.json of its models and its scheduler_config.json with those of the original pipeline."
        ) from error
