"""Tensors of a network from safetensors files, read one at a time: comparing two checkpoints takes the memory of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.backbones.loading import family, pipeline_index
from wadi.errors import WadiError

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before a network's names


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, each read when asked for.

    Raises:
        WadiError: on construction, if a file is missing or damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise WadiError(
                    f"Weights {str(file)!r} cannot be read: {str(error).splitlines()[0]}. Expected a safetensors file."
                ) from error
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                plain = name
                for wrapper in WRAPPERS:
                    plain = plain.removeprefix(wrapper)
                self._places[plain] = (opened, name)

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


def network_weights(path: str | Path) -> LazyTensors:
    """The network's tensors of a pipeline (folder or Hub id), or those of a single safetensors file.

    Raises:
        WadiError: if there are none, or they cannot be read.
    """
    if Path(path).is_file():
        return LazyTensors([Path(path)])
    component = family(str(pipeline_index(path).get("_class_name"))).component
    folder = Path(path) if Path(path).exists() else _fetched(str(path), component)
    found = sorted((folder / component).glob("*.safetensors"))
    plain = [file for file in found if ".fp16." not in file.name and ".ema" not in file.name and "non_ema" not in file.name]
    if not found:
        raise WadiError(
            f"{str(path)!r} has no safetensors weights under {component}/. Expected some: load the pipeline and save it with "
            "save_pretrained()."
        )
    return LazyTensors(plain or found)


def _fetched(hub_id: str, component: str) -> Path:
    from huggingface_hub import snapshot_download

    from wadi.backbones.loading import loading

    with loading(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=[f"{component}/*.safetensors", f"{component}/*.json"]))


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
