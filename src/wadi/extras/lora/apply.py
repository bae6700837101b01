"""Apply an adapter of the many-step teacher to the weights of its one-step student. Nothing stays attached.

A LoRA adds ``dW = s (alpha / r) B A`` to each weight ``W``. A LoRaD adapter rotates the weight by ``s A B``. The student's
weight is the teacher's weight, rotated by the student's angles: ``W_s = rot(W, theta_s)``.

- LoRaD: ``rot(W_s, s theta)``. Both rotations use the same planes, so the angles add and their order does not matter.
- LoRA: ``W_s + dW``, as diffusers' own loader computes it. If the student's adapter is given, ``rot(W + dW, theta_s) = W_s +
  rot(dW, theta_s)``: the student's angles on the customised teacher. Rotation is linear in the weight, so it is enough to
  rotate the change.

docs/dreambooth.md compares their results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wadi import roles
from wadi.backbones import from_pipeline
from wadi.errors import WadiError
from wadi.extras.lora.changes import add_change, find_changes
from wadi.extras.lora.file import read_lora
from wadi.extras.lora.locate import locate_lora
from wadi.extras.lora.lorad import rotate_by_adapter, student_angles
from wadi.io.bounds import ADAPTER_SCALE


def apply_lora(pipeline: Any, file: str | Path, scale: float = 1.0, student: str | Path | None = None) -> int:
    """Apply a LoRA or a DreamBooth adapter to the weights of ``pipeline``, in place.

    This is made for a one-step pipeline (`wadi.load`) and an adapter of its many-step teacher. A many-step pipeline works too.
    Afterwards the pipeline is an ordinary one: no adapter is attached, ``save_pretrained`` writes the changed weights, and
    another adapter can be applied.

    Args:
        file: LoRA, DoRA, LoHa or LoKr as diffusers, PEFT, kohya, LyCORIS or ComfyUI's trainers write them (``.safetensors``, or
            the folder that contains it), or the folder of a LoRaD adapter that `wadi dreambooth` wrote.
        scale: strength of the change, from -4 to 4; 0 leaves the pipeline as it is, bit for bit.
        student: adapter folder of the student that ``pipeline`` is. The change of a LoRA is then rotated by the student's
            angles. A LoRaD adapter gives the same result with and without it.

    Returns:
        The number of layers that the adapter changes.
    Raises:
        WadiError: if the file is missing, damaged or of a kind that cannot be applied (a pickle, OFT, a student's own adapter),
            has NaN values or keys that fit no layer, or ``scale`` is out of range. The pipeline is then unchanged.
    """
    check_scale(scale)
    path = locate_lora(file)
    backbone = from_pipeline(pipeline)
    roles.refuse_adapted(backbone.network)
    if path.is_dir():
        return rotate_by_adapter(backbone.network, path, scale)
    changes = find_changes(pipeline, backbone.component, read_lora(path))
    angles = {} if student is None else student_angles(backbone.network, Path(student))
    if scale != 0:
        for change in changes:
            add_change(pipeline, change, scale, angles.get(change.layer) if change.part == backbone.component else None)
    return len(changes)


def check_scale(scale: float, what: str = "the LoRA") -> None:
    """Raise `WadiError` if the ``scale`` of ``what`` is not a number from -4 to 4."""
    if not ADAPTER_SCALE.accepts(scale):
        raise WadiError(
            f"The scale of {what} is {scale}. Give a {ADAPTER_SCALE!r}: 1 applies it as it was trained, 0 leaves the weights "
            "unchanged."
        )
