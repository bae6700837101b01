"""Tensors of a network from safetensors files, read one at a time: comparing two checkpoints takes the memory of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.backbones.loading import family, pipeline_index
from wadi.backbones.stored import fetch, split_variant, weights_in
from wadi.errors import WadiError
from wadi.io.weights import opened

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before a network's names


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, each read when asked for.

    Raises:
        WadiError: on construction, if a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            tensors = opened(file)
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                plain = name
                for wrapper in WRAPPERS:
                    plain = plain.removeprefix(wrapper)
                self._places[plain] = (tensors, name)

    def __getitem__(self, name: str) -> Tensor:
        opened, stored = self._places[name]
        tensor: Tensor = opened.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        opened, stored = self._places[name]
        return tuple(opened.get_slice(stored).get_shape())


def network_weights(path: str | Path, variant: str | None = None) -> LazyTensors:
    """The network's tensors of a pipeline (folder or Hub id) as `load_pipeline` loads them, or of a single safetensors file.

    Raises:
        WadiError: if there are none, or they cannot be read.
    """
    path, named = split_variant(path)
    variant = variant or named
    if Path(path).is_file():
        return LazyTensors([Path(path)])
    component = family(str(pipeline_index(path).get("_class_name"))).component
    folder = Path(path) if Path(path).exists() else fetch(str(path), component, variant)
    return LazyTensors(weights_in(folder / component, variant).files)


def compare(expected: Mapping[str, tuple[int, ...]], found: LazyTensors, what: str, whose: str) -> None:
    """Raise `WadiError` if the tensors of ``found`` are not those ``expected`` (shapes by name): another architecture."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != found.shape(name))
    told = [
        f"{len(names)} {kind} (first: {names[0]})"
        for names, kind in ((missing, "missing"), (unknown, "unknown"), (reshaped, "of another shape"))
        if names
    ]
    if told:
        raise WadiError(
            f"{what} is of another architecture than {whose}: {', '.join(told)} of {len(expected)} tensors. Expected two "
            "checkpoints of one network: give the teacher that the student was made from."
        )
