"""Load a student with the teacher's norms or directions put back into its weights: the rest shows which of them matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wadi.analysis.sources import adapter_folder
from wadi.analysis.swap import put_back
from wadi.backbones import from_pipeline, load_pipeline
from wadi.errors import WadiError
from wadi.pipelines.load import load


def load_hybrid(
    teacher: str,
    student: str,
    weights: Any,
    take: str,
    matches: Callable[[str], bool],
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, list[str]]:
    """Return the student's pipeline with the teacher's norms or directions, and the names of the layers that changed.

    Args:
        teacher, student: as in `load_any_student`.
        weights: of the teacher's network, by name.
        take: ``'norm'`` or ``'direction'``, taken from the teacher.
        matches: whether a layer of this name is changed.
    Raises:
        WadiError: as `load_any_student`; or if the two networks do not fit.
    """
    pipeline = load_any_student(teacher, student, dtype)
    return pipeline, put_back(from_pipeline(pipeline).network, weights, take, matches)


def load_any_student(teacher: str, student: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the pipeline of ``student``, with its one-step scheduler.

    Args:
        teacher: pipeline that an adapter is applied to. If it is a file of weights, the one that the adapter names.
        student: a run, an adapter folder, a pipeline, or zoo.
    Raises:
        WadiError: if ``student`` is a bare state dict, which has no scheduler, or cannot be loaded.
    """
    folder = adapter_folder(student)
    if folder is not None:
        base = None if Path(teacher).is_file() else teacher
        return load(adapter=folder, teacher=base, dtype=dtype)
    if Path(student).is_file():
        raise WadiError(
            f"Student {student!r} is a state dict, which has no scheduler and so cannot generate. Give a pipeline, a run or an "
            "adapter. `wadi import-authors` and `wadi extract` make one from a state dict."
        )
    return load_pipeline(student, dtype)
