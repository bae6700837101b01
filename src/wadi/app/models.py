"""The students of the page by their names, loaded when they are first used. Visitors choose names; they never give a path."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError, short_repr
from wadi.zoo.paths import NAME as ZOO

KEPT = 2  # students, and teachers, in memory


@dataclass(frozen=True)
class Source:
    """A student that the page offers: its name, and the folder of its run or export; None = the embedded student."""

    name: str
    folder: Path | None

    @property
    def is_run(self) -> bool:
        """Whether there is a distillation to look at."""
        return self.folder is not None and not (self.folder / "model_index.json").is_file()

    @property
    def teacher(self) -> str | None:
        """Path, Hub id or ``zoo`` of the teacher; None for an export, which has none.

        Raises:
            WadiError: if the folder's config is missing or damaged.
        """
        if self.folder is None:
            return ZOO
        if not self.is_run:
            return None
        from wadi.distill.config_files import read_settings

        teacher = read_settings(self.folder / "config.yaml").get("teacher")
        return None if teacher is None else str(teacher)

    def stamp(self) -> tuple[int, ...]:
        """Return what changes when a run saves its student again."""
        if self.folder is None or not self.is_run:
            return ()
        file = self.folder / "student" / "adapter_model.safetensors"
        try:
            status = file.stat()
        except OSError:  # no student yet, or the folder is gone: loading says which
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns


def sources(runs: Sequence[str]) -> list[Source]:
    """Return the students for the folders on the command line, with names that differ; without any, the embedded student.

    Raises:
        WadiError: if a folder is neither a run nor an exported pipeline.
    """
    found: list[Source] = []
    for run in dict.fromkeys(runs or [ZOO]):
        folder = None if run == ZOO else Path(run).absolute()
        if folder is not None and not any((folder / name).is_file() for name in ("config.yaml", "model_index.json")):
            raise WadiError(
                f"{run!r} is neither a run nor an exported pipeline: it has no config.yaml and no model_index.json. Give the "
                f"--out folder of `wadi distill` or `wadi export`, or {ZOO} for the embedded student."
            )
        names = {source.name for source in found}
        plain = ZOO if folder is None else folder.name or str(folder)
        name = next(name for name in (plain, *(f"{plain} ({i})" for i in range(2, len(runs) + 2))) if name not in names)
        found.append(Source(name, folder))
    return found


class Models:
    """Load pipelines of `Source`s and keep the last `KEPT`. Not for several threads at once: `wadi.app.studio` has the lock."""

    def __init__(self, sources: Sequence[Source], dtype: Any, device: Any) -> None:
        self.sources = {source.name: source for source in sources}
        self.place = {"dtype": dtype, "device": device}
        self._loaded: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def source(self, name: str) -> Source:
        """Return the source of a name. Raise `WadiError` for a name that is not on the page."""
        if name not in self.sources:
            raise WadiError(f"There is no model {short_repr(name)}. Choose one of {', '.join(self.sources)}.")
        return self.sources[name]

    def student(self, name: str) -> Any:
        """Return a student's pipeline, loaded again if its run has saved it again since.

        Raises:
            WadiError: as `wadi.load`.
        """
        source = self.source(name)

        def load() -> Any:
            from wadi.pipelines.load import load

            return load(source.folder, **self.place)

        return self._kept(("student", name, source.stamp()), load)

    def teacher(self, name: str) -> Any:
        """Return the pipeline of a student's teacher.

        Raises:
            WadiError: as `wadi.pipelines.load.load_teacher_pipeline`; or if the student is an export.
        """
        source = self.source(name)
        if source.folder is not None and not source.is_run:
            raise WadiError(f"Model {name!r} is an exported pipeline, which has no teacher. Clear 'Teacher beside'.")

        def load() -> Any:
            from wadi.pipelines.load import load_teacher_pipeline

            return load_teacher_pipeline(source.folder, **self.place)

        return self._kept(("teacher", name), load)

    def _kept(self, key: tuple[Any, ...], load: Any) -> Any:
        source = self.source(key[1])
        if source.folder is not None and not source.folder.is_dir():
            raise WadiError(f"The folder of model {source.name!r} is gone. Restore it, or choose another model.")
        if key not in self._loaded:
            same = [old for old in self._loaded if old[0] == key[0]]
            outdated = [old for old in same if old[1] == key[1]]
            for old in outdated or same[: max(0, len(same) - KEPT + 1)]:  # before the next one needs its memory
                del self._loaded[old]
            self._loaded[key] = _warm(load())
        self._loaded.move_to_end(key)
        return self._loaded[key]


def _warm(pipeline: Any) -> Any:
    """Return ``pipeline`` after one call: the first one pays for set-up, and must not count in the times that are shown."""
    from wadi.pipelines.generate import Sampling, generate_images

    pipeline.set_progress_bar_config(disable=True)
    generate_images(pipeline, ["a"], [0], Sampling(steps=1))
    return pipeline
