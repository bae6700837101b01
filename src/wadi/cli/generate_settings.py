"""The settings that images of ``wadi generate`` depend on, for the manifest of their folder.

A later call continues the folder if its settings are the same. Files count by what they contain, not by name, so a folder of
weights may be moved.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from wadi.cli.generate_options import strength_from
from wadi.io.files import sha256

NOT_SETTINGS = {  # options that images do not depend on, or that are in the manifest in another form
    "prompt", "prompts", "out", "seed", "count", "batch", "device", "compare", "overwrite", "teacher_steps",
    "guidance_scale", "run", "adapter", "teacher", "family",
}  # fmt: skip


def image_settings(options: Any) -> dict[str, Any]:
    """Return everything apart from prompt and seed that the images depend on, as JSON values."""
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS and value not in (None, False)}
    settings.setdefault("steps", trained_steps(options))
    if options.init is not None:
        settings["strength"] = strength_from(options)
    return {"student": _student_settings(options), **{name: content_of(value) for name, value in settings.items()}}


def trained_steps(options: Any) -> int:
    """Return the number of steps that the student was trained for, which is the default of ``--steps``."""
    from wadi.backbones.base import stored_timesteps
    from wadi.backbones.configs import pipeline_index
    from wadi.pipelines.load import is_export, locate_adapter, read_student

    if is_export(options.run):
        return len(stored_timesteps(pipeline_index(options.run)) or (1,))
    return len(read_student(locate_adapter(options.run, options.adapter, options.teacher)[0]).timesteps)


def _student_settings(options: Any) -> dict[str, Any]:
    """Return digests of the student's weights, its timestep and its resolution."""
    from wadi.backbones.digest import teacher_digest
    from wadi.evaluate.generators import one_or_list
    from wadi.pipelines.load import is_export, local_adapter, locate_adapter, read_student

    if is_export(options.run):
        return {"pipeline": teacher_digest(options.run)}
    folder, base = locate_adapter(options.run, options.adapter, options.teacher)
    about = read_student(folder)
    if isinstance(options.adapter, dict):  # in any order: the images are the same
        parts = [{**_adapter_digests(local_adapter(part)), "scale": scale} for part, scale in options.adapter.items()]
        weights: dict[str, Any] = {"adapters": sorted(parts, key=str)}
    else:
        weights = _adapter_digests(folder)
    return {
        **weights, "teacher": teacher_digest(base), "timestep": one_or_list(about.timesteps), "resolution": about.resolution,
    }  # fmt: skip


def _adapter_digests(folder: Path) -> dict[str, Any]:
    return {
        "adapter": sha256(folder / "adapter_model.safetensors"), "adapter_config": sha256(folder / "adapter_config.json")
    }  # fmt: skip


def content_of(value: Any) -> Any:
    """Return the digest of the file or folder that ``value`` names, or ``value`` itself if it names none; of a list, a list."""
    if isinstance(value, (list, tuple)):
        return [content_of(item) for item in value]
    if not isinstance(value, str) or not os.path.exists(value):
        return value
    path = Path(value)
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files).encode()).hexdigest()
