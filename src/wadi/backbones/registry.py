"""Find the backbone of a pipeline, by the name of the pipeline's class.

Families come from the table below, from `register_family`, and from installed packages with an entry point in the group
``wadi.families``. Its name is the pipeline's class, and its value is ``module:class`` of the backbone.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from wadi.backbones.base import Backbone
from wadi.errors import WadiError, first_line
from wadi.io.imports import imported

GROUP = "wadi.families"  # of entry points

# Pipeline class name -> "module:class" of its backbone, or the class. Families are imported on use, so that nobody imports
# those that they do not use.
FAMILIES: dict[str, str | type[Backbone]] = {
    "StableDiffusionPipeline": "wadi.backbones.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "wadi.backbones.sdxl:StableDiffusionXL",
    "PixArtAlphaPipeline": "wadi.backbones.pixart:PixArt",
    "PixArtSigmaPipeline": "wadi.backbones.pixart:PixArt",
    "StableDiffusion3Pipeline": "wadi.backbones.sd3:StableDiffusion3",
    "FluxPipeline": "wadi.backbones.flux:Flux",
    "SanaPipeline": "wadi.backbones.sana:Sana",
    "ZImagePipeline": "wadi.backbones.z_image:ZImage",
    "Lumina2Pipeline": "wadi.backbones.lumina2:Lumina2",
    "ChromaPipeline": "wadi.backbones.chroma:Chroma",
    "QwenImagePipeline": "wadi.backbones.qwen_image:QwenImage",
    "Flux2Pipeline": "wadi.backbones.flux2:Flux2",
    "Flux2KleinPipeline": "wadi.backbones.flux2:Flux2Klein",
}


def register_family(pipeline_class: str, backbone: str | type[Backbone]) -> None:
    """Use ``backbone`` for pipelines of class ``pipeline_class``.

    Args:
        pipeline_class: name of the class, as ``model_index.json`` has it.
        backbone: the class, or ``"module:class"``, which is imported at once.
    Raises:
        WadiError: if it is not a complete family (what is missing), or cannot be imported.
    """
    if not (isinstance(pipeline_class, str) and pipeline_class.isidentifier()):
        raise WadiError(
            f"A family was registered for {pipeline_class!r}. Give the name of a pipeline's class, such as 'MyPipeline'."
        )
    FAMILIES[pipeline_class] = checked(backbone, f"The family of {pipeline_class}")


def checked(backbone: Any, what: str) -> type[Backbone]:
    """Return a backbone class, given as such or as ``"module:class"``, if it has all that a family must have.

    Args:
        what: who states it, at the start of the message.
    Raises:
        WadiError: if it cannot be imported, is not a subclass of `Backbone`, or lacks a method or an attribute.
    """
    place = backbone if isinstance(backbone, str) else getattr(backbone, "__qualname__", repr(backbone))
    if isinstance(backbone, str):
        if not re.fullmatch(r"[\w.]+:\w+", backbone):
            raise WadiError(f"{what} is {backbone!r}. Give the class, or 'module:class'.")
        try:
            backbone = imported(backbone)
        except WadiError:
            raise
        except Exception as error:  # a module may raise anything while it is imported
            raise WadiError(
                f"{what} is {place!r}, which cannot be imported: {type(error).__name__}: {first_line(error)}. Correct the "
                "name, or install its package."
            ) from error
    if not (inspect.isclass(backbone) and issubclass(backbone, Backbone)):
        raise WadiError(f"{what} is {place!r}, which is not a subclass of wadi.backbones.Backbone. Derive it from that class.")
    if missing := sorted(backbone.__abstractmethods__):
        raise WadiError(
            f"{what}, {place!r}, has no {' and no '.join(f'{name}()' for name in missing)}. Add the method to the class."
        )
    if backbone.default_targets.__func__ is not Backbone.default_targets.__func__:  # type: ignore[attr-defined]
        return backbone
    for name in ("student_targets", "fake_targets"):
        pattern = getattr(backbone, name, None)
        if not isinstance(pattern, str):
            raise WadiError(
                f"{what}, {place!r}, has {pattern!r} under {name}. Set it to a regular expression that matches names of layers."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise WadiError(
                f"{what}, {place!r}, has {name} {pattern!r}, which is not a regular expression: {error}."
            ) from error
    return backbone


def family(pipeline_class: str) -> type[Backbone]:
    """Return the backbone class for pipelines of class ``pipeline_class``.

    Raises:
        WadiError: if there is none, or that of an installed package is not complete.
    """
    found = FAMILIES.get(pipeline_class)
    if found is None:
        installed = _installed()
        if pipeline_class not in installed:
            known = ", ".join(sorted({*FAMILIES, *installed}))
            raise WadiError(
                f"The teacher is a {pipeline_class}, which is not supported. Supported are {known}. Name the file of your own "
                "family with --family FILE.py, or write one: see docs/add-a-family.md."
            )
        entry = installed[pipeline_class]
        source = f"the package {entry.dist.name}" if entry.dist else "an installed package"
        FAMILIES[pipeline_class] = checked(entry.value, f"The family of {pipeline_class} from {source}")
    elif isinstance(found, str):
        FAMILIES[pipeline_class] = checked(found, f"The family of {pipeline_class}")
    backbone = FAMILIES[pipeline_class]
    assert not isinstance(backbone, str)
    return backbone


def _installed() -> dict[str, EntryPoint]:
    """Return the families of installed packages by the pipeline's class. Nothing of them is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


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
