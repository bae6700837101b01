"""From what a user names to a result: draw what is missing, look at every set of pictures once, gather the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.backbones import from_pipeline
from wadi.errors import WadiError
from wadi.evaluate import drawn
from wadi.evaluate.generators import Generator, same_family
from wadi.evaluate.memory import peak_mib
from wadi.evaluate.pairs import Pairs, paired, read_pairs
from wadi.evaluate.pictures import content_digest, files_in
from wadi.evaluate.protocols import SEED_STEP, Protocol
from wadi.evaluate.result import Result, Row, environment
from wadi.evaluate.score import Judge, Options, Seen
from wadi.io.regular import exists
from wadi.metrics.speed import TimedPipeline, measure_speed
from wadi.parallel.ranks import Ranks
from wadi.pipelines.generate import Sampling, generate_images


@dataclass(frozen=True)
class Reference:
    """What pictures are held against: files, or a teacher that draws them; ``about`` goes into the hash."""

    about: dict[str, Any]
    files: Sequence[Path] | None = None
    teacher: Generator | None = None


def of_folder(folder: str | Path, protocol: Protocol | None = None) -> Reference:
    """A folder of pictures as a reference.

    Raises:
        WadiError: if it is empty, or was drawn for another protocol.
    """
    refuse_other_prompts(Path(folder), protocol, "Reference")
    files = files_in(folder)
    return Reference({"kind": "folder", "count": len(files), "sha256": content_digest(files)}, files)


def of_protocol(protocol: Protocol) -> Reference:
    """The reference that a protocol brings along, told by its settings."""
    if protocol.reference is None:
        raise WadiError(f"Protocol {protocol.name!r} has no reference of its own. Expected --reference: a folder of pictures.")
    return Reference({}, protocol.reference)


def of_teacher(teacher: Generator, protocol: Protocol) -> Reference:
    """A teacher's many-step pictures of the same prompts, from noise of their own (set 0)."""
    about = {"kind": "drawn", "count": len(protocol.prompts), "set": 0, "generator": teacher.about}
    return Reference(about, teacher=teacher)


def refuse_other_prompts(folder: Path, protocol: Protocol | None, what: str) -> None:
    """Raise `WadiError` if the folder's pictures were drawn for other prompts than the protocol's."""
    about = drawn.read_about(folder) if folder.is_dir() else None
    if protocol is None or about is None:
        return
    own, asked = about.get("prompts"), {"count": len(protocol.prompts), "sha256": drawn.prompts_digest(protocol.prompts)}
    if own != asked:
        told = "; ".join(drawn.differences({"prompts": own}, {"prompts": asked}))
        raise WadiError(
            f"{what} {str(folder)!r} was drawn for another protocol: {told}. Expected pictures of the prompts of "
            f"{protocol.name!r}: draw them with it."
        )


class Evaluation:
    """One protocol, one reference, any number of generators or folders that are measured alike.

    Args:
        protocol: None = folders as they are, with ``prompts`` in the order of their files, or ``pairs`` of file and prompt.
        pictures: folder in which what is drawn is kept, each generator in a folder of its own.
        set_number: which seeds; see `wadi.evaluate.protocols`.
        ranks: the processes that share the drawing; the first alone measures.
    Raises:
        WadiError: on an unknown metric, or weights that are not on this machine.
    """

    def __init__(
        self, metrics: Sequence[str], options: Options | None = None, protocol: Protocol | None = None,
        reference: Reference | None = None, pictures: str | Path = "runs/eval", *, prompts: Sequence[str] | None = None,
        pairs: Pairs | None = None, size: int | None = None, set_number: int = 1, draw_batch: int = 8,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.ranks = ranks or Ranks()
        self.judge = Judge(metrics, options, load=self.ranks.index == 0)
        self.protocol, self.reference = protocol, reference
        if reference is not None and reference.files is not None:
            self.judge.check_reference(len(reference.files))
        self.pairs = pairs
        self.prompts = list(protocol.prompts) if protocol is not None else prompts
        self.size = size if size is not None or protocol is None else protocol.size
        self.set_number, self.draw_batch = set_number, draw_batch
        self.pictures = Path(pictures)
        if protocol is not None:
            self.pictures /= f"{protocol.name}-{drawn.prompts_digest(protocol.prompts)[:8]}"
        self._reference: Seen | None = None
        self._prompts: set[tuple[int, str]] = set()  # number and digest of those that metrics were given

    def draw(self, generators: Sequence[Generator]) -> None:
        """Everything that is to be drawn and is not there yet, the reference included; processes share it."""
        protocol = self._protocol()
        self.judge.check(len(protocol.prompts), reference=self.reference is not None)
        if self.reference is not None and self.reference.teacher is not None:
            self._draw(self.reference.teacher, protocol.prompts, protocol.seeds(0), self._reference_folder())
        for generator in generators:
            self._draw(generator, protocol.prompts, protocol.seeds(self.set_number), self.folder(generator))
            if "diversity" in self.judge.metrics:
                self._draw(generator, *protocol.varied_rows(self.set_number), self.folder(generator) / "varied")

    def folder(self, generator: Generator) -> Path:
        """Where a generator's pictures are kept."""
        return self.pictures / f"{generator.key}-set{self.set_number}"

    def drawn_row(self, generator: Generator) -> Row:
        """Measure what `draw` has drawn of a generator."""
        protocol, folder = self._protocol(), self.folder(generator)
        varied = None
        if "diversity" in self.judge.metrics:
            prompts = protocol.varied_rows(self.set_number)[0]
            seen = self.judge.look(_numbered(folder / "varied", len(prompts)), size=self.size, only=["features"])
            varied = (seen.features["features"], prompts)
        seen = self.judge.look(_numbered(folder, len(protocol.prompts)), protocol.prompts, self.size)
        numbers = self.judge.numbers(seen, self._look_at_reference(), protocol.labels, varied, protocol.prompts)
        return Row(generator.name, {**generator.about, "set": self.set_number}, seen.count, numbers)

    def folder_row(self, folder: str | Path) -> Row:
        """Measure a folder of pictures; one that was drawn by a protocol tells its own prompts.

        Raises:
            WadiError: if it is empty, was drawn for another protocol, or does not pair with the prompts.
        """
        folder = Path(folder)
        refuse_other_prompts(folder, self.protocol, "Folder")
        told = drawn.read_about(folder)
        files = files_in(folder)
        pairs = self.pairs
        if told is not None:
            files = [path for path in files if path.parent == folder]  # below lie those for diversity
            if pairs is None and self.judge.reads_prompts and exists(folder / drawn.PROMPTS):
                pairs = read_pairs(folder / drawn.PROMPTS)
        prompts = self.prompts
        if prompts is None and pairs is not None:
            files, prompts = paired(folder, files, pairs)
        about: dict[str, Any] = {"kind": "folder", "folder": str(folder)}
        if told is not None:
            about |= {"drawn_by": told.get("generator"), "seeds": told.get("seeds")}
        return self.row(files, prompts, folder.name, about)

    def row(
        self, source: Any, prompts: Sequence[str] | None = None, name: str = "pictures", about: dict[str, Any] | None = None
    ) -> Row:
        """Measure any source of pictures, as `wadi.evaluate.pictures.stream` takes them."""
        prompts = prompts if prompts is not None else self.prompts
        if hasattr(source, "__len__"):
            self.judge.check(len(source), prompts=prompts is not None, reference=self.reference is not None)
            if prompts is not None and len(prompts) != len(source):
                raise WadiError(
                    f"Received {len(source)} pictures ({name}) and {len(prompts)} prompts. Expected one prompt for each "
                    "picture, in the natural order of the files' names (2 before 10); --pairs lists files with prompts."
                )
        seen = self.judge.look(source, prompts, self.size)
        if prompts is not None and self._prompts_are_settings:
            self._prompts.add((len(prompts), drawn.prompts_digest(prompts)))
        varied = _repeated(seen.features["features"], prompts) if "diversity" in self.judge.metrics and prompts else None
        labels = self.protocol.labels if self.protocol is not None else None
        known = prompts if self._prompts_are_settings else None
        numbers = self.judge.numbers(seen, self._look_at_reference(), labels, varied, known)
        return Row(name, about or {"kind": "pictures"}, seen.count, numbers)

    def result(self, rows: Sequence[Row], command: str = "") -> Result:
        """Rows, and what they rest on.

        Raises:
            WadiError: if the rows are of different numbers of pictures, or of different prompts.
        """
        counts = sorted({row.images for row in rows})
        if len(counts) != 1:
            raise WadiError(f"Received sets of {counts} pictures. Expected as many in each, for their numbers depend on it.")
        if len(self._prompts) > 1:
            raise WadiError("Received sets of pictures of different prompts. Expected the same ones: measure each by itself.")
        reference = self._look_at_reference()
        several = reference.count if reference else None
        settings = self.judge.settings(counts[0], several, self.size, self._prompts_are_settings)
        settings["protocol"] = self.protocol.name if self.protocol is not None else None
        if self.protocol is not None:
            settings |= self.protocol.settings
            known = all(self._of_set(row) for row in rows)
            settings["seeds"] = {"rule": f"set * {SEED_STEP} + index", "set": self.set_number} if known else None
        elif self._prompts:
            ((count, digest),) = self._prompts
            settings["prompts"] = {"count": count, "sha256": digest}
        if self.reference is not None:
            content = {}
            if self.protocol is not None and self.reference.files is self.protocol.reference and self.reference.files:
                content = {"sha256": content_digest(self.reference.files)}
            settings["reference"] = {**settings.get("reference", {}), **self.reference.about, **content}
        return Result(settings, list(rows), environment(self.judge.options.device, torch.get_num_threads()), command)

    @property
    def _prompts_are_settings(self) -> bool:
        """Whether the prompts of every row are known and in the hash, so that the spreads may rest on them."""
        return self.prompts is not None or self.pairs is not None or self.judge.reads_prompts

    def _of_set(self, row: Row) -> bool:
        """Whether a row's pictures are from the seeds of the set; a folder of others' pictures does not tell its own."""
        seeds = drawn.seeds_digest(self._protocol().seeds(self.set_number))
        return row.generator.get("set") == self.set_number or row.generator.get("seeds") == seeds

    def _look_at_reference(self) -> Seen | None:
        if self._reference is None and self.reference is not None and self.judge.comparing:
            files: Any = self.reference.files
            if self.reference.teacher is not None:
                files = _numbered(self._reference_folder(), len(self._protocol().prompts))
            self._reference = self.judge.look(files, size=self.size, only=self.judge.comparing)
        return self._reference

    def _reference_folder(self) -> Path:
        assert self.reference is not None
        assert self.reference.teacher is not None
        return self.pictures / f"{self.reference.teacher.key}-set0"

    def _draw(self, generator: Generator, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
        drawn.draw_missing(generator, prompts, seeds, folder, self.draw_batch, self.ranks)

    def _protocol(self) -> Protocol:
        if self.protocol is None:
            raise WadiError("A run, adapter or pipeline draws its pictures by a protocol. Expected --protocol.")
        return self.protocol


def time_generators(
    generators: Sequence[Generator], prompts: Sequence[str], repeats: int = 20, batch: int = 8, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Speed of each generator, all in one run and in turns: see `wadi.metrics.speed`.

    Raises:
        WadiError: if they are of different model families.
    """
    pipelines = {generator.key: generator.open() for generator in generators}
    first, *others = pipelines.values()
    for other in others:
        same_family(first, other)
    asked = [prompts[i % len(prompts)] for i in range(batch)]

    def subject(generator: Generator) -> TimedPipeline:
        pipeline = pipelines[generator.key]

        def call(count: int) -> None:
            sampling = Sampling(generator.steps, generator.guidance_scale, batch=count)
            generate_images(pipeline, asked[:count], range(count), sampling)

        modules = tuple(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
        return TimedPipeline(call, from_pipeline(pipeline).network, modules)

    subjects = {generator.key: subject(generator) for generator in generators}
    found = []
    for generator, speed in zip(generators, measure_speed(subjects, repeats, batch, device), strict=True):
        timed = subjects[generator.key]

        def call(timed: TimedPipeline = timed) -> None:
            timed.call(batch)

        # Each by itself: all of them lie in this process at once.
        memory = peak_mib(call, (timed.network, *timed.modules), device)
        found.append({**asdict(speed), "name": generator.name, "peak_memory_mib": memory})
    return found


def _numbered(folder: Path, count: int) -> list[Path]:
    return [folder / drawn.file_name(i) for i in range(count)]


def _repeated(features: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Features and prompts of the pictures whose prompt stands there more than once.

    Raises:
        WadiError: if none does.
    """
    times = Counter(prompts)
    rows = [i for i, prompt in enumerate(prompts) if times[prompt] > 1]
    if not rows:
        raise WadiError("No prompt has two pictures. Metric 'diversity' needs at least 2 pictures of a prompt: repeat prompts.")
    return features[rows], [prompts[i] for i in rows]
