"""The zoo: an embedded text-to-image teacher with 12 M parameters that generates emoji, and its one-step student.

``load_teacher`` loads the ``StableDiffusionPipeline`` in this package, ``load_classifier`` the network that judges images, and
``training_prompts`` returns the captions for a distillation. Start with `prompts.py`. `wadi.zoo.recipe` contains the training
of the teacher (docs/zoo.md). Importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.paths import embedded_path
from wadi.zoo.prompts import caption, concept_of, eval_prompts, fixed_prompts, training_prompts

if TYPE_CHECKING:
    import torch

    from wadi.zoo.judge import Classifier

__all__ = [
    "COLOURS",
    "CONCEPTS",
    "STYLES",
    "caption",
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
    """Return the folder of the embedded teacher, which ``DiffusionPipeline.from_pretrained`` loads."""
    return embedded_path("teacher")


def student_path() -> Path:
    """Return the folder of the embedded one-step student's LoRaD adapter."""
    return embedded_path("student")


def classifier_path() -> Path:
    """Return the folder of the classifier."""
    return embedded_path("classifier")


def load_teacher(dtype: torch.dtype | None = None) -> Any:
    """Load the embedded teacher as a ``StableDiffusionPipeline`` on the CPU, in float32 by default."""
    import torch

    from wadi.backbones.loading import load_pipeline

    return load_pipeline(teacher_path(), torch.float32 if dtype is None else dtype)


def load_classifier() -> Classifier:
    """Load the classifier.

    It has ``.concepts``, and ``.logits(images)`` and ``.features(images)`` for images ``(B, 3, 64, 64)`` in [0, 1].
    """
    from wadi.zoo.judge import read_classifier

    return read_classifier(classifier_path())
