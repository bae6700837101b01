"""The generators of a protocol's images: a student, its teacher, the teacher forced to one step, or any pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wadi import roles
from wadi.backbones import Backbone, family, from_pipeline, load_pipeline
from wadi.backbones.base import RESOLUTION, stored_timesteps
from wadi.backbones.configs import pipeline_index, read_config
from wadi.backbones.digest import teacher_digest
from wadi.backbones.weight_files import split_variant
from wadi.diffusion.process import Process
from wadi.diffusion.schedulers import make_scheduler, one_step_scheduler
from wadi.errors import WadiError
from wadi.io.files import sha256
from wadi.io.versions import installed_versions
from wadi.pipelines import load
from wadi.zoo.paths import NAME

NOT_SETTINGS = ("base_model_name_or_path", "auto_mapping", "peft_version", "revision", "inference_mode", "task_type")
# Images may depend on the versions of these.
LIBRARIES = ("wadi-onestep", "torch", "diffusers", "transformers", "peft", "tokenizers")


@dataclass(frozen=True)
class Generator:
    """A pipeline that is loaded when it is needed, and the settings of its calls.

    Attributes:
        name: of its row in tables.
        about: everything its images depend on besides prompts and seeds, as plain JSON values.
        open: loads the pipeline.
        steps, guidance_scale: of each call.
    """

    name: str
    about: dict[str, Any]
    open: Callable[[], Any]
    steps: int = 1
    guidance_scale: float | None = None

    @property
    def key(self) -> str:
        """A unique folder name: the kind, the steps, and a digest of `about` and of the libraries' versions."""
        digest = hashlib.sha256(json.dumps([self.about, installed_versions(LIBRARIES)], sort_keys=True).encode()).hexdigest()
        return f"{self.about['kind']}-{self.steps}step-{digest[:8]}"


@dataclass(frozen=True)
class Source:
    """A source of images that a user names: a run, an adapter's folder, a pipeline (folder or Hub id), or 'zoo'.

    Attributes:
        teacher: used instead of the one that the adapter names.
    """

    name: str
    run: str | None = None
    adapter: str | None = None
    teacher: str | None = None  # in place of the one that the adapter names
    pipeline: bool = False
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"

    @property
    def _place(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}

    @property
    def _student(self) -> dict[str, Any]:
        return {"run": self.run, "adapter": self.adapter, "teacher": self.teacher}

    def is_student(self) -> bool:
        """Return whether this is a student, or a pipeline that says so."""
        return not self.pipeline or bool(stored_timesteps(pipeline_index(self.name)))

    def own_steps(self) -> int:
        """Return the number of steps that a student was trained for; 1 for a pipeline that does not say."""
        if self.pipeline:
            return len(stored_timesteps(pipeline_index(self.name)) or (1,))
        return len(load.read_student(load.locate_adapter(self.run, self.adapter, self.teacher)[0]).timesteps)

    def plain(self, steps: int | None = None, guidance_scale: float | None = None) -> Generator:
        """Return the student in its own steps, or a pipeline with its own scheduler in ``steps`` steps; None = `own_steps`.

        Raises:
            WadiError: if a student is to take another number of steps than it was trained for.
        """
        steps = self.own_steps() if steps is None else steps
        if self.pipeline:
            about = {"kind": "pipeline", "weights": teacher_digest(self.name), **self._call(self.name, steps, guidance_scale)}
            return Generator(
                f"{_short(self.name)}, {_steps(steps)}",
                about,
                lambda: load_pipeline(self.name, **self._place),
                steps,
                guidance_scale,
            )
        folder, base = load.locate_adapter(self.run, self.adapter, self.teacher)
        timesteps = load.read_student(folder).timesteps
        if steps != len(timesteps):
            raise WadiError(
                f"--steps is {steps}, but {self.name!r} is a student of {_steps(len(timesteps))} "
                f"(timesteps {list(timesteps)}). Leave out --steps, or give a pipeline."
            )
        about = {
            "kind": "student", "adapter": sha256(folder / "adapter_model.safetensors"), "teacher": teacher_digest(base),
            "adapter_config": config_digest(folder), "timestep": one_or_list(timesteps),
            **self._resolution(), **self._call(base, len(timesteps), guidance_scale),
        }  # fmt: skip
        return Generator(
            f"{'shipped student' if self.name == NAME else _short(self.name)}, {_steps(len(timesteps))}", about,
            lambda: load.load(**self._student, **self._place), len(timesteps), guidance_scale,
        )  # fmt: skip

    def many_steps(self, steps: int, guidance_scale: float) -> Generator:
        """Return the teacher behind a student, with its family's deterministic sampler."""
        about = {"kind": "teacher", "weights": teacher_digest(self._base()), **self._resolution()}
        about |= self._call(self._base(), steps, guidance_scale)
        return Generator(f"teacher, {_steps(steps)}", about, self._teacher, steps, guidance_scale)

    def undistilled(self, timestep: int) -> Generator:
        """Return the teacher forced to one step from ``timestep``."""
        base = self._base()
        about = {"kind": "undistilled", "weights": teacher_digest(base), "timestep": timestep, **self._resolution()}
        about |= self._call(base, 1, None)

        def forced() -> Any:
            pipeline = self._teacher()
            pipeline.scheduler = one_step_scheduler(pipeline.scheduler, timestep)
            return pipeline

        return Generator(f"teacher forced to one step, t = {timestep}", about, forced)

    def timestep(self) -> int | None:
        """Return the student's first timestep; None for a pipeline, whose scheduler has it."""
        if self.pipeline:
            return None
        return load.read_student(load.locate_adapter(self.run, self.adapter, self.teacher)[0]).timesteps[0]

    def last_timestep(self) -> int:
        """Return the noisiest timestep of the teacher's schedule, by its config: ``T - 1``, or ``T`` for a flow."""
        return Process.from_scheduler(make_scheduler(read_config(self._base(), "scheduler"))).last_timestep

    def guidance(self, given: float | None, otherwise: float) -> float:
        """Return the guidance scale of many steps: ``given``, or else the family's default, or else ``otherwise``."""
        return _family_of(self.name if self.pipeline else self._base()).teacher_guidance(given, otherwise)

    def _teacher(self) -> Any:
        if self.pipeline:
            pipeline = load_pipeline(self._base(), **self._place)
            backbone = from_pipeline(pipeline, self._stored_resolution())
            pipeline.scheduler = backbone.sampler()
            backbone.remember_resolution()
            return pipeline
        return load.load_teacher_pipeline(**self._student, **self._place)

    def _stored_resolution(self) -> tuple[int, int] | None:
        """Return the ``(height, width)`` stored with a student or a pipeline; None = the model's own."""
        if not self.pipeline:
            return load.read_student(load.locate_adapter(self.run, self.adapter, self.teacher)[0]).resolution
        stored = pipeline_index(self.name).get(RESOLUTION)
        return (stored[0], stored[1]) if stored else None

    def _resolution(self) -> dict[str, Any]:
        """Return `_stored_resolution` as an entry of `Generator.about`; nothing if it is the model's own."""
        stored, base = self._stored_resolution(), self._base()
        return {} if stored is None or stored == native_resolution(base) else {"resolution": list(stored)}

    def _base(self) -> str:
        """Return the teacher's path or Hub id."""
        if not self.pipeline:
            return load.locate_adapter(self.run, self.adapter, self.teacher)[1]
        if self.teacher is None:
            raise WadiError(f"{self.name!r} is a pipeline, which does not name its teacher. Add --teacher.")
        return self.teacher

    def _call(self, path: str, steps: int, guidance_scale: float | None) -> dict[str, Any]:
        """Return how the pipeline at ``path`` is called; raise `WadiError` if no family serves it."""
        call = {"steps": steps, "guidance_scale": guidance_scale, "dtype": str(self.dtype).removeprefix("torch.")}
        backbone_class = _family_of(path)
        arguments = None if guidance_scale is None else backbone_class.guidance_arguments(guidance_scale)
        # Only if the scale is not passed as it is, so that results of the other families keep their keys.
        return call if arguments in (None, {"guidance_scale": guidance_scale}) else call | {"arguments": arguments}


def one_or_list(timesteps: Sequence[int]) -> int | list[int]:
    """Return a single timestep as a number, as results of one-step students have it, and several as a list."""
    return timesteps[0] if len(timesteps) == 1 else list(timesteps)


def native_resolution(path: str) -> tuple[int, int] | None:
    """Return the ``(height, width)`` at which a pipeline generates by default, from its configs; None if they do not say.

    Raises:
        WadiError: if no family serves the pipeline, or it lacks a config.
    """
    from diffusers.configuration_utils import FrozenDict

    index, backbone_class = pipeline_index(path), _family_of(path)
    if stored := index.get(RESOLUTION):
        return stored[0], stored[1]
    channels = [
        value
        for name, value in read_config(path, "vae").items()
        if name in ("block_out_channels", "encoder_block_out_channels")
    ]
    if backbone_class.scale is not Backbone.scale or len(channels) != 1 or not isinstance(channels[0], list):
        return None
    try:
        config = FrozenDict(read_config(path, backbone_class.component))
        return backbone_class.native_resolution(
            config, 2 ** (len(channels[0]) - 1)
        )  # as every pipeline of diffusers computes it
    except (AttributeError, TypeError, ValueError):
        return None


def config_digest(folder: Path) -> str:
    """Return a digest of an adapter's settings, without its paths and versions."""
    settings = {name: value for name, value in roles.read_config(folder).items() if name not in NOT_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _family_of(path: str) -> type[Backbone]:
    return family(str(pipeline_index(path).get("_class_name")))


def find(name: str, **place: Any) -> Source | None:
    """Return the `Source` that ``name`` means, or None if it is a folder of images (with none of our or diffusers' files).

    Raises:
        WadiError: if it is neither a folder nor a Hub id.
    """
    folder = Path(split_variant(name)[0])
    if name == NAME:
        return Source(name, **place)
    if load.is_export(folder):
        return Source(name, pipeline=True, **place)
    if (folder / "config.yaml").is_file():
        return Source(name, run=name, **place)
    if (folder / "adapter_config.json").is_file():
        return Source(name, adapter=name, **place)
    if folder.exists():
        return None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise WadiError(f"{name!r} does not exist. Give a folder of images, a run, an adapter, a pipeline or a Hub id.")
    return Source(name, pipeline=True, **place)


def require_same_family(student: Any, teacher: Any) -> None:
    """Raise `WadiError` unless one family serves both pipelines; otherwise their speeds cannot be compared."""
    families = [type(from_pipeline(pipeline)).__name__ for pipeline in (student, teacher)]
    if families[0] != families[1]:
        raise WadiError(
            f"The student is of the family {families[0]}, but the teacher of {families[1]}. Give the teacher that the student "
            "was made from."
        )


def _short(name: str) -> str:
    """Return a name for tables: the last part of an absolute path, or the name unchanged."""
    return Path(name).name if Path(name).is_absolute() else name


def _steps(steps: int) -> str:
    return "one step" if steps == 1 else f"{steps} steps"
