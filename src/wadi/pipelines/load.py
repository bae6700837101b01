"""Load a student, or the teacher behind it, as a plain diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wadi import roles
from wadi.backbones import Backbone, from_pipeline, load_pipeline
from wadi.backbones.digest import loaded_digest
from wadi.backbones.family_files import use_family
from wadi.backbones.hub import adapter_folder
from wadi.distill import config_files
from wadi.errors import WadiError
from wadi.pipelines.combine import Adapters, check_same_teacher, read_parts
from wadi.zoo.paths import embedded_path, resolve_teacher


def load(
    run: str | Path | None = None,
    *,
    adapter: Adapters | None = None,
    teacher: str | Path | None = None,
    lora: Adapters | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """Return a diffusers pipeline that generates in one step: ``pipe(prompt, num_inference_steps=1, guidance_scale=0.0)``.

    A student of ``N`` steps needs ``num_inference_steps=N``.

    The rotation is merged into the weights, and the scheduler starts at the student's timestep. Neither the pipeline nor a
    folder written by its ``save_pretrained`` needs this package. FLUX.1 dev takes the guidance scale as an input: pass
    ``guidance_scale=3.5``, its default.

    Args:
        run: folder of a run or of an exported pipeline. Without ``run`` and ``adapter``, the embedded student is loaded.
        adapter: folder or Hub id of a student's adapter, or several with scales: ``{"a": 0.7, "b": 0.3}``
            (`wadi.pipelines.combine`).
        teacher: pipeline folder or Hub id that the adapter is merged into; default: the one that the run or adapter names.
        lora: LoRA file or folder to add to the weights of the student, or several with their scales
            (`wadi.extras.lora.apply.apply_lora`).
        dtype: of all weights.
        device: where to put the pipeline.
    Raises:
        WadiError: if a folder does not hold what its argument needs, adapters and teacher do not fit, or the named teacher's
            files changed after the training. An explicit ``teacher`` may be another one.
    """
    if adapter is None and is_export(run):
        pipeline = load_pipeline(str(run), dtype, device)
    elif isinstance(adapter, Mapping):
        pipeline = _load_combined(run, adapter, teacher, dtype, device)
    else:
        backbone, _ = open_student(run, adapter=adapter, teacher=teacher, dtype=dtype, device=device)
        roles.fuse(backbone.network, "student")
        pipeline = backbone.pipeline
    if lora is not None:
        from wadi.extras.lora.apply import apply_lora

        for file, scale in lora.items() if isinstance(lora, Mapping) else ((lora, 1.0),):
            apply_lora(pipeline, file, scale)
    return pipeline


def _load_combined(
    run: str | Path | None,
    adapters: Mapping[Any, float],
    teacher: str | Path | None,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Any:
    """Return the pipeline of several adapters, merged at their scales. The first one names teacher and timesteps."""
    parts = read_parts({local_adapter(adapter): scale for adapter, scale in adapters.items()})
    if teacher is None:
        check_same_teacher(parts)
    folder, base = locate_adapter(run, parts[0].folder, teacher)
    about, backbone = _open_base(folder, base, dtype, device)
    if teacher is None:
        _check_unchanged(folder, base, about, backbone.pipeline)
    roles.refuse_adapted(backbone.network)
    roles.fuse_folders(backbone.network, {part.folder: part.scale for part in parts})
    backbone.remember_timesteps(about.timesteps)
    return backbone.pipeline


def open_student(
    run: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    teacher: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Backbone, roles.About]:
    """Return the teacher with the student's scheduler and its adapter ``student``, not merged, and the student's settings.

    Arguments and errors as in `load`; an exported pipeline has no adapter.
    """
    folder, base = locate_adapter(run, adapter, teacher)
    about, backbone = _open_base(folder, base, dtype, device)
    if teacher is None:
        _check_unchanged(folder, base, about, backbone.pipeline)
    roles.refuse_adapted(backbone.network)
    roles.load(backbone.network, folder, "student")
    backbone.remember_timesteps(about.timesteps)
    return backbone, about


def load_teacher_pipeline(
    run: str | Path | None = None,
    *,
    adapter: Adapters | None = None,
    teacher: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """Return the many-step pipeline behind a student, with the family's deterministic sampler. Arguments as in `load`."""
    _, backbone = _open_base(*locate_adapter(run, adapter, teacher), dtype, device)
    backbone.pipeline.scheduler = backbone.sampler()
    return backbone.pipeline


def _open_base(folder: Path, base: str, dtype: torch.dtype, device: str | torch.device) -> tuple[roles.About, Backbone]:
    """Read a student's settings, and load the pipeline ``base`` at the student's resolution."""
    about = read_student(folder)
    backbone = from_pipeline(load_pipeline(base, dtype, device), about.resolution)
    backbone.remember_resolution()
    return about, backbone


def _check_unchanged(folder: Path, base: str, about: roles.About, pipeline: Any) -> None:
    """Raise `WadiError` if the files of a student's teacher are not those that it was trained on."""
    found = loaded_digest(pipeline)
    if about.teacher_digest is not None and found is not None and found != about.teacher_digest:
        raise WadiError(
            f"The teacher {base!r} changed after student {str(folder)!r} was trained on it: the digest of its files is "
            f"{found[:12]}, and was {about.teacher_digest[:12]}. Restore the files, or name this teacher (--teacher, teacher=) "
            "to use the student on it as it is now."
        )


def is_export(run: str | Path | None) -> bool:
    """Return whether ``run`` is a diffusers pipeline: the merged weights of a student, without its teacher."""
    return run is not None and (Path(run) / "model_index.json").is_file()


def locate_adapter(run: str | Path | None, adapter: Adapters | None, teacher: str | Path | None) -> tuple[Path, str]:
    """Return ``(adapter folder, teacher's path or Hub id)`` for the arguments of `load`; of several adapters the first.

    Raises:
        WadiError: if both run and adapter are given, the run has no config or no student, no teacher is named, or
            the file of the run's family cannot be used.
    """
    if isinstance(adapter, Mapping):
        adapter = next(iter(adapter), None)
    if run is not None and adapter is not None:
        raise WadiError(f"Received both run {str(run)!r} and adapter {str(adapter)!r}. Give one of them.")
    if run is None:
        folder = local_adapter(adapter) if adapter is not None else embedded_path("student")
        return folder, resolve_teacher(str(teacher or _read_about(folder).teacher))
    settings = Path(run) / "config.yaml"
    if not settings.is_file():
        raise WadiError(
            f"{str(run)!r} is not a run: it has no config.yaml. Give a folder that `wadi distill` or `wadi export` wrote with "
            "--out."
        )
    # Bounds are not checked: earlier versions accepted settings that are now out of bounds.
    stored = config_files.read_settings(settings)
    folder, named = Path(run) / "student", stored.get("teacher")
    if not (named or teacher):
        raise WadiError(f"Config {str(settings)!r} names no teacher. Set --teacher.")
    if not folder.is_dir():
        raise WadiError(f"Run {str(run)!r} has no student yet: it stopped before its first checkpoint. Continue it first.")
    use_family(stored.get("family"), f"Run {str(run)!r}")
    return folder, resolve_teacher(str(teacher or named))


def local_adapter(adapter: str | Path) -> Path:
    """Return the folder of an adapter, or of the download of the one with this Hub id.

    Raises:
        WadiError: if it cannot be downloaded.
    """
    return adapter_folder(adapter, roles.FILES)


def read_student(folder: Path) -> roles.About:
    """Return timestep, resolution and teacher of a student's adapter, from the ``wadi.json`` in its folder.

    Raises:
        WadiError: if the folder is not an adapter, or ``wadi.json`` is missing or damaged.
    """
    roles.read(folder)  # report a damaged adapter first
    return roles.read_about(folder)


def _read_about(folder: Path) -> roles.About:
    """Return the same without reading the weights."""
    roles.read_config(folder)
    return roles.read_about(folder)
