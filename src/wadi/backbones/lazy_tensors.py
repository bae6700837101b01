"""Read a network's tensors from safetensors files one at a time.

So comparing two checkpoints needs only the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.backbones.configs import pipeline_index
from wadi.backbones.hub import download_component
from wadi.backbones.registry import family
from wadi.backbones.weight_files import component_weights, split_variant
from wadi.errors import WadiError
from wadi.io.tensors import open_tensors
from wadi.io.weight_checks import tensor_differences

WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile put before tensor names


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name. Each is read when it is accessed.

    Raises:
        WadiError: on construction, if a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            stored = open_tensors(file)
            for name in stored.keys():  # noqa: SIM118  (safe_open is not a mapping)
                plain = name
                for wrapper in WRAPPERS:
                    plain = plain.removeprefix(wrapper)
                self._places[plain] = (stored, name)

    def __getitem__(self, name: str) -> Tensor:
        stored, stored_name = self._places[name]
        tensor: Tensor = stored.get_tensor(stored_name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading its values."""
        stored, stored_name = self._places[name]
        return tuple(stored.get_slice(stored_name).get_shape())


def network_weights(path: str | Path, variant: str | None = None) -> LazyTensors:
    """Return the network's tensors of a pipeline (folder or Hub id), or of a single safetensors file.

    Raises:
        WadiError: if there are none, or they cannot be read.
    """
    path, named = split_variant(path)
    variant = variant or named
    if Path(path).is_file():
        return LazyTensors([Path(path)])
    component = family(str(pipeline_index(path).get("_class_name"))).component
    folder = Path(path) if Path(path).exists() else download_component(str(path), component, variant)
    return LazyTensors(component_weights(folder / component, variant).files)


def check_same_tensors(expected: Mapping[str, tuple[int, ...]], received: LazyTensors, what: str, whose: str) -> None:
    """Raise `WadiError` if ``received`` has other names or shapes than ``expected`` (shapes by name).

    Args:
        what: name of the received checkpoint in the message.
        whose: name of the expected one.
    """
    if differences := tensor_differences(expected, {name: received.shape(name) for name in received}):
        raise WadiError(
            f"{what} has another architecture than {whose}: {differences} of {len(expected)} tensors. Give two checkpoints of "
            "the same network: the student and the teacher that it was made from."
        )
