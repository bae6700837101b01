"""The evaluation of images: generate the missing ones, run the networks on each set, and collect the rows of a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.evaluate import generated
from wadi.evaluate.generators import Generator
from wadi.evaluate.image_sets import content_digest, files_in
from wadi.evaluate.judge import Judge, NetworkOutputs
from wadi.evaluate.metric_table import Options
from wadi.evaluate.pairs import Pairs, pair_with_prompts, read_pairs
from wadi.evaluate.protocols import SEED_STEP, Protocol
from wadi.evaluate.reference import Reference, require_same_prompts
from wadi.evaluate.result import Result, Row, environment
from wadi.io.regular import exists
from wadi.parallel.ranks import Ranks


class Evaluation:
    """One protocol, one reference, and any number of generators or folders that are measured with the same settings.

    Args:
        protocol: None = measure folders as they are, with ``prompts`` in the order of their files, or ``pairs`` of file and
            prompt.
        folder: where generated images are stored, with a folder for each generator.
        set_number: which seeds; see `wadi.evaluate.protocols`.
        batch: images that are generated at once.
        ranks: the processes that share the generation; only the first one measures.
    Raises:
        WadiError: on an unknown metric, or weights that are not on this machine.
    """

    def __init__(
        self, metrics: Sequence[str], options: Options | None = None, protocol: Protocol | None = None,
        reference: Reference | None = None, folder: str | Path = "runs/eval", *, prompts: Sequence[str] | None = None,
        pairs: Pairs | None = None, size: int | None = None, set_number: int = 1, batch: int = 8,
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
        self.set_number, self.batch = set_number, batch
        self.folder = Path(folder)
        if protocol is not None:
            self.folder /= f"{protocol.name}-{generated.prompts_digest(protocol.prompts)[:8]}"
        self._cached_reference: NetworkOutputs | None = None
        self._prompts: set[tuple[int, str]] = set()  # number and digest of the prompts of each measured set

    def generate(self, generators: Sequence[Generator]) -> None:
        """Generate all missing images, including those of the reference. The processes share the work."""
        protocol = self._require_protocol()
        self.judge.check(len(protocol.prompts), reference=self.reference is not None)
        if self.reference is not None and self.reference.teacher is not None:
            self._generate(self.reference.teacher, protocol.prompts, protocol.seeds(0), self._reference_folder())
        for generator in generators:
            self._generate(generator, protocol.prompts, protocol.seeds(self.set_number), self.folder_of(generator))
            if "diversity" in self.judge.metrics:
                self._generate(generator, *protocol.varied_rows(self.set_number), self.folder_of(generator) / "varied")

    def folder_of(self, generator: Generator) -> Path:
        """Return the folder of a generator's images."""
        return self.folder / f"{generator.key}-set{self.set_number}"

    def generated_row(self, generator: Generator) -> Row:
        """Measure the images that `generate` has made for a generator."""
        protocol, folder = self._require_protocol(), self.folder_of(generator)
        varied = None
        if "diversity" in self.judge.metrics:
            prompts = protocol.varied_rows(self.set_number)[0]
            outputs = self.judge.run_networks(
                _numbered_files(folder / "varied", len(prompts)), size=self.size, only=["features"]
            )
            varied = (outputs.features["features"], prompts)
        outputs = self.judge.run_networks(_numbered_files(folder, len(protocol.prompts)), protocol.prompts, self.size)
        metrics = self.judge.compute(outputs, self._reference_outputs(), protocol.labels, varied, protocol.prompts)
        return Row(generator.name, {**generator.about, "set": self.set_number}, outputs.count, metrics)

    def folder_row(self, folder: str | Path) -> Row:
        """Measure a folder of images. If a protocol generated it, the prompts are in the folder.

        Raises:
            WadiError: if it is empty, was generated for another protocol, or does not match the prompts.
        """
        folder = Path(folder)
        require_same_prompts(folder, self.protocol, "Folder")
        stored_about = generated.read_about(folder)
        files = files_in(folder)
        pairs = self.pairs
        if stored_about is not None:
            files = [path for path in files if path.parent == folder]  # the images in folders below are for diversity
            if pairs is None and self.judge.needs_prompts and exists(folder / generated.PROMPTS):
                pairs = read_pairs(folder / generated.PROMPTS)
        prompts = self.prompts
        if prompts is None and pairs is not None:
            files, prompts = pair_with_prompts(folder, files, pairs)
        about: dict[str, Any] = {"kind": "folder", "folder": str(folder)}
        if stored_about is not None:
            about |= {"drawn_by": stored_about.get("generator"), "seeds": stored_about.get("seeds")}
        return self.row(files, prompts, folder.name, about)

    def row(
        self, source: Any, prompts: Sequence[str] | None = None, name: str = "pictures", about: dict[str, Any] | None = None
    ) -> Row:
        """Measure any source of images, as `wadi.evaluate.image_sets.stream` takes them."""
        prompts = prompts if prompts is not None else self.prompts
        if hasattr(source, "__len__"):
            self.judge.check(len(source), prompts=prompts is not None, reference=self.reference is not None)
            if prompts is not None and len(prompts) != len(source):
                raise WadiError(
                    f"There are {len(source)} images ({name}) and {len(prompts)} prompts. Give one for each image, in the "
                    "natural order of the files' names (2 before 10), or use --pairs."
                )
        outputs = self.judge.run_networks(source, prompts, self.size)
        if prompts is not None and self._prompts_are_settings:
            self._prompts.add((len(prompts), generated.prompts_digest(prompts)))
        varied = (
            _with_repeated_prompts(outputs.features["features"], prompts)
            if "diversity" in self.judge.metrics and prompts
            else None
        )
        labels = self.protocol.labels if self.protocol is not None else None
        known_prompts = prompts if self._prompts_are_settings else None
        metrics = self.judge.compute(outputs, self._reference_outputs(), labels, varied, known_prompts)
        return Row(name, about or {"kind": "pictures"}, outputs.count, metrics)

    def result(self, rows: Sequence[Row], command: str = "") -> Result:
        """Return rows with the settings that they depend on.

        Raises:
            WadiError: if the rows have different numbers of images, or different prompts.
        """
        counts = sorted({row.images for row in rows})
        if len(counts) != 1:
            raise WadiError(f"The sets have {counts} images. Metrics depend on the number, so give sets of the same size.")
        if len(self._prompts) > 1:
            raise WadiError("The sets of images have different prompts. Measure each set in a command of its own.")
        reference = self._reference_outputs()
        reference_count = reference.count if reference else None
        settings = self.judge.settings(counts[0], reference_count, self.size, self._prompts_are_settings)
        settings["protocol"] = self.protocol.name if self.protocol is not None else None
        if self.protocol is not None:
            settings |= self.protocol.settings
            seeds_known = all(self._has_known_seeds(row) for row in rows)
            settings["seeds"] = {"rule": f"set * {SEED_STEP} + index", "set": self.set_number} if seeds_known else None
        elif self._prompts:
            ((count, digest),) = self._prompts
            settings["prompts"] = {"count": count, "sha256": digest}
        if self.reference is not None:
            files_digest = {}
            if self.protocol is not None and self.reference.files is self.protocol.reference and self.reference.files:
                files_digest = {"sha256": content_digest(self.reference.files)}
            settings["reference"] = {**settings.get("reference", {}), **self.reference.about, **files_digest}
        return Result(settings, list(rows), environment(self.judge.options.device, torch.get_num_threads()), command)

    @property
    def _prompts_are_settings(self) -> bool:
        """Whether the prompts of every row are known and in the hash, so that spreads may depend on them."""
        return self.prompts is not None or self.pairs is not None or self.judge.needs_prompts

    def _has_known_seeds(self, row: Row) -> bool:
        """Return whether a row's images have the seeds of the set. A folder of other images does not say its seeds."""
        seeds = generated.seeds_digest(self._require_protocol().seeds(self.set_number))
        return row.generator.get("set") == self.set_number or row.generator.get("seeds") == seeds

    def _reference_outputs(self) -> NetworkOutputs | None:
        if self._cached_reference is None and self.reference is not None and self.judge.reference_networks:
            files: Any = self.reference.files
            if self.reference.teacher is not None:
                files = _numbered_files(self._reference_folder(), len(self._require_protocol().prompts))
            self._cached_reference = self.judge.run_networks(files, size=self.size, only=self.judge.reference_networks)
        return self._cached_reference

    def _reference_folder(self) -> Path:
        assert self.reference is not None
        assert self.reference.teacher is not None
        return self.folder / f"{self.reference.teacher.key}-set0"

    def _generate(self, generator: Generator, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
        generated.generate_missing(generator, prompts, seeds, folder, self.batch, self.ranks)

    def _require_protocol(self) -> Protocol:
        if self.protocol is None:
            raise WadiError("A run, adapter or pipeline generates images by a protocol. Add --protocol.")
        return self.protocol


def _numbered_files(folder: Path, count: int) -> list[Path]:
    return [folder / generated.file_name(i) for i in range(count)]


def _with_repeated_prompts(features: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the features and prompts of the images whose prompt occurs more than once.

    Raises:
        WadiError: if there are none.
    """
    times = Counter(prompts)
    rows = [i for i, prompt in enumerate(prompts) if times[prompt] > 1]
    if not rows:
        raise WadiError("No prompt has two images. Metric 'diversity' needs prompts with at least 2 images each.")
    return features[rows], [prompts[i] for i in rows]
