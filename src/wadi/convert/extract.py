"""Extract a LoRaD adapter from two checkpoints: the angles that turn the teacher's weights into the student's.

`wadi.convert.angles_between` has the mathematics.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi import roles
from wadi.backbones import family
from wadi.backbones.base import TIMESTEPS, stored_timesteps
from wadi.backbones.configs import build_network, pipeline_index, read_config
from wadi.backbones.lazy_tensors import LazyTensors, check_same_tensors, network_weights
from wadi.convert.angles_between import LayerChange, best_factors, measure_change
from wadi.diffusion.schedulers import DISTILLED, make_scheduler, stored_timestep, timestep_of
from wadi.errors import WadiError
from wadi.io.files import whole_folder
from wadi.io.outputs import check_out
from wadi.io.weight_checks import check_finite
from wadi.lorad.angles import set_factors
from wadi.zoo.paths import resolve_teacher

NAME = "student"


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`.

    Attributes:
        timesteps: at which the student generates.
        outside: names of tensors that changed and have no angles. The adapter leaves them as they are.
    """

    rank: int
    timesteps: tuple[int, ...]
    layers: list[LayerChange]
    outside: list[str]

    @property
    def kept(self) -> float:
        """`LayerChange.kept` over all layers with angles, weighted by their change; 1 if nothing changed."""
        return _weighted_share(self.layers, "kept")

    @property
    def rotation(self) -> float:
        """`LayerChange.rotation` over all layers with angles, weighted by their change."""
        return _weighted_share(self.layers, "rotation")

    @property
    def lora(self) -> float:
        """`LayerChange.lora` over all layers with angles, weighted by their change."""
        return _weighted_share(self.layers, "lora")


def _weighted_share(layers: list[LayerChange], share: str) -> float:
    total = sum(layer.change**2 for layer in layers)
    return sum(getattr(layer, share) * layer.change**2 for layer in layers) / total if total else 1.0


def extract(
    teacher: str,
    student: str,
    rank: int,
    out: Path,
    target_modules: str | None = None,
    timestep: int | None = None,
) -> Extraction:
    """Write the adapter that turns ``teacher`` into ``student`` to ``out``, with a report in ``extraction.json``.

    Args:
        teacher: pipeline folder or Hub id, or 'zoo'.
        student: the same, or a safetensors file of the network alone.
        target_modules: regular expression over module names; None = the family's default for students.
        timestep: at which the student generates; None = those of the student's pipeline, or the last one of the teacher's.
    Raises:
        WadiError: if the two have different architectures, one cannot be read, or ``out`` exists.
    """
    check_out(out)
    source = resolve_teacher(teacher)
    network, targets = _skeleton(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    before, after = network_weights(source), network_weights(resolve_teacher(student))
    check_same_tensors(shapes, before, f"Teacher {teacher!r}", "its own config")
    check_same_tensors(shapes, after, f"Student {student!r}", f"teacher {teacher!r}")
    names = _attach(network, target_modules or targets, rank)
    timesteps = (timestep,) if timestep else _timesteps(source, student)
    extraction = Extraction(rank, timesteps, *_set_angles(network, names, before, after, rank))
    about = {"timesteps": list(timesteps), "teacher": teacher, "extracted_from": student}
    with whole_folder(out) as folder:
        roles.write(network, NAME, folder)
        (folder / "wadi.json").write_text(json.dumps(about, indent=2) + "\n")
        (folder / "extraction.json").write_text(json.dumps(asdict(extraction), indent=2) + "\n")
    return extraction


def _skeleton(path: str) -> tuple[nn.Module, str]:
    """Return the network of a pipeline without weights, and the layers that a student's adapter is on."""
    backbone = family(str(pipeline_index(path).get("_class_name")))
    config = read_config(path, backbone.component)
    with torch.device("meta"):
        network: Any = build_network(config)
    return network, backbone.default_targets(network.config)[0]


def _attach(network: nn.Module, targets: str, rank: int) -> list[str]:
    from wadi.lorad import LoRaDConfig

    with torch.device("meta"):
        return roles.attach(network, NAME, LoRaDConfig(r=rank, target_modules=targets))


def _set_angles(
    network: nn.Module, names: list[str], before: LazyTensors, after: LazyTensors, rank: int
) -> tuple[list[LayerChange], list[str]]:
    """Set the angles of every adapted layer. Return the changes, and the names of tensors that changed elsewhere."""
    changes = []
    for name in names:
        W, S = before[f"{name}.weight"], after[f"{name}.weight"]
        for network_name, tensor in (("The teacher", W), ("The student", S)):
            check_finite(network_name, {f"{name}.weight": tensor})
        A, B = best_factors(W, S, rank)
        layer: Any = network.get_submodule(name)
        set_factors(layer, NAME, A, B)
        changes.append(measure_change(name, W, S, A, B))
    adapted = {f"{name}.weight" for name in names}
    outside = [name for name in before if name not in adapted and not torch.equal(before[name].float(), after[name].float())]
    return changes, sorted(outside)


def _timesteps(teacher: str, student: str) -> tuple[int, ...]:
    """Return the timesteps that a pipeline written by `wadi export` holds; for another student, the teacher's last one."""
    if not Path(student).is_file():
        path = resolve_teacher(student)
        if several := stored_timesteps(pipeline_index(path)):
            return several
        config = read_config(path, "scheduler")
        if config.get("_class_name") in DISTILLED:
            raise WadiError(
                f"{student!r} has a {config['_class_name']}, and its {TIMESTEPS!r} does not say at which timesteps it "
                "generates. Give --timestep to use its weights for a student of one step."
            )
        stored = stored_timestep(config)
        if stored is not None:
            return (stored,)
    if not Path(teacher).is_file():
        return (timestep_of(make_scheduler(read_config(resolve_teacher(teacher), "scheduler"))),)
    raise WadiError(f"Neither {student!r} nor {teacher!r} has a scheduler. Give --timestep.")


def describe(extraction: Extraction, layers: int = 10) -> str:
    """Return the extraction as lines of text: the layers that changed most, and the total."""
    columns = ("norm_change", "direction_change", "angle_rms", "rotation", "kept")
    lines = [f"{'layer':<64}" + "".join(f"{column:>18}" for column in columns)]
    for layer in sorted(extraction.layers, key=lambda layer: -layer.change)[:layers]:
        lines.append(f"{layer.name[-63:]:<64}" + "".join(f"{getattr(layer, column):18.5f}" for column in columns))
    lines.append(f"... of {len(extraction.layers)} layers, the {min(layers, len(extraction.layers))} that changed most")
    share = extraction.rotation
    lines.append(
        f"Of the squared change of these layers {share:.1%} is rotation within pairs, {1 - share:.1%} their norms; "
        f"rank {extraction.rank} keeps {extraction.kept:.1%}."
    )
    if extraction.lora > extraction.kept + 0.01:
        lines.append(
            f"A LoRA of rank {extraction.rank} would keep {extraction.lora:.1%}. To write it, use "
            f"`wadi export STUDENT --teacher TEACHER --to lora --rank {extraction.rank}`."
        )
    if extraction.outside:
        lines.append(
            f"{len(extraction.outside)} tensors without angles changed (first: {extraction.outside[0]}). The adapter leaves "
            "them as they are in the teacher."
        )
    lines.append(f"Student's timesteps: {', '.join(map(str, extraction.timesteps))}.")
    return "\n".join(lines)
