"""The embedded teacher: a complete text-to-image pipeline of 12 M parameters that draws emoji, and how it was made.

``load_teacher`` gives the ``StableDiffusionPipeline`` shipped in this package, ``load_classifier`` the network that
judges pictures, ``training_prompts`` what a distillation needs to know of the data: text alone. `wadi.zoo.recipe` is how it was
made (docs/zoo.md). Importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.paths import embedded_path
from wadi.zoo.prompts import caption, captions, concept_of, eval_prompts, fixed_prompts, training_prompts

if TYPE_CHECKING:
    import torch

    from wadi.zoo.judge import Classifier

__all__ = [
    "COLOURS",
    "CONCEPTS",
    "STYLES",
    "caption",
    "captions",
    "classifier_path",
    "concept_of",
    "eval_prompts",
    "fixed_prompts",
    "load_classifier",
    "load_teacher",
    "student_path",
    "teacher_path",
    "training_prompts",
]


def teacher_path() -> Path:
    """Folder of the embedded teacher, which ``DiffusionPipeline.from_pretrained`` loads."""
    return embedded_path("teacher")


def student_path() -> Path:
    """Folder of the LoRaD adapter of the embedded one-step student."""
    return embedded_path("student")


def classifier_path() -> Path:
    """Folder of the classifier."""
    return embedded_path("classifier")


def load_teacher(dtype: torch.dtype | None = None) -> Any:
    """The embedded teacher as a ``StableDiffusionPipeline`` on the CPU, in float32 if no ``dtype`` is given."""
    import torch

    from wadi.backbones.loading import load_pipeline

    return load_pipeline(teacher_path(), torch.float32 if dtype is None else dtype)


def load_classifier() -> Classifier:
    """The classifier: ``.logits(images)``, ``.features(images)`` of images ``(B, 3, 64, 64)`` in [0, 1], ``.concepts``."""
    from wadi.zoo.judge import read_classifier

    return read_classifier(classifier_path())
