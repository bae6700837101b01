"""A LoRaD adapter from two checkpoints: the angles that turn a teacher's weights into a student's.

Neighbouring columns of a row of ``W`` are a pair ``w = w_e + i w_o``, and a rotation by ``theta`` makes it ``w e^{i theta}``.
So two weights determine the angle that brings each pair of one closest to the other,

    theta = arg(conj(w) s) = atan2(w_e s_o - w_o s_e, w_e s_e + w_o s_o),

and what it leaves, the change of the pairs' lengths, no rotation can make. The best rank-R matrix near ``Theta``, which is
``(out, fan_in // 2)``, is its truncated singular value decomposition ``U S V^T``, shared as ``A = U sqrt(S)`` and
``B = sqrt(S) V^T``. On weights that LoRaD made, with angles below half a turn, ``Theta`` is ``A B`` itself and nothing is lost
but rounding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import family
from wadi.backbones.configs import build_network, pipeline_index, read_config
from wadi.backbones.lazy_tensors import LazyTensors, check_same_tensors, network_weights
from wadi.diffusion.schedulers import make_scheduler, stored_timestep, timestep_of
from wadi.errors import WadiError
from wadi.io.files import whole_folder
from wadi.io.outputs import check_out
from wadi.io.weight_checks import check_finite
from wadi.lorad.angles import set_factors
from wadi.zoo.paths import resolve_teacher

NAME = "student"


@dataclass(frozen=True)
class LayerChange:
    """What happened to one layer between teacher and student.

    Attributes:
        norm_change: mean over rows of ``abs(|s| - |w|) / |w|``.
        direction_change: mean over rows of ``1 - cos(w, s)``.
        angle_rms: root mean square of the angles, in radians.
        change: ``|S - W| / |W|``, Frobenius.
        rotation: share of ``|S - W|^2`` that rotating the pairs accounts for; the rest is the pairs' lengths.
        kept: share of ``|S - W|^2`` that angles of the asked rank account for.
    """

    name: str
    norm_change: float
    direction_change: float
    angle_rms: float
    change: float
    rotation: float
    kept: float


@dataclass(frozen=True)
class Extraction:
    """What `extract` found. ``outside``: names of tensors that changed and have no angles, which the adapter leaves alone."""

    rank: int
    timestep: int
    layers: list[LayerChange]
    outside: list[str]

    @property
    def kept(self) -> float:
        """`LayerChange.kept` over all layers with angles, weighted by how much each changed; 1 if nothing did."""
        return _weighted(self.layers, "kept")

    @property
    def rotation(self) -> float:
        """`LayerChange.rotation`, likewise."""
        return _weighted(self.layers, "rotation")


def _weighted(layers: list[LayerChange], share: str) -> float:
    total = sum(layer.change**2 for layer in layers)
    return sum(getattr(layer, share) * layer.change**2 for layer in layers) / total if total else 1.0


# --- tensors ----------------------------------------------------------------------------------------------------------------


def pairs(W: Tensor) -> Tensor:
    """``w_e + i w_o`` ``(out, fan_in // 2)``, complex128, of a weight ``(out, ...)``; an odd last column is left out."""
    matrix = W.flatten(1).double()
    even = matrix.shape[1] // 2 * 2
    return torch.complex(matrix[:, 0:even:2].contiguous(), matrix[:, 1:even:2].contiguous())


def angles_between(W: Tensor, S: Tensor) -> Tensor:
    """``Theta`` ``(out, fan_in // 2)``, float64, in ``(-pi, pi]``: the rotation of the pairs of ``W`` closest to ``S``."""
    return torch.angle(pairs(W).conj() * pairs(S))


def factors(theta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` ``(out, rank)`` and ``B`` ``(rank, fan_in // 2)``, float32, padded with zeros: ``A B`` is nearest to ``theta``."""
    U, S, Vh = torch.linalg.svd(theta, full_matrices=False)
    held = min(rank, len(S))
    A, B = theta.new_zeros(theta.shape[0], rank), theta.new_zeros(rank, theta.shape[1])
    root = S[:held].sqrt()  # shared between the two, so that neither is out of scale
    A[:, :held], B[:held] = U[:, :held] * root, root[:, None] * Vh[:held]
    return A.float(), B.float()


def measure(name: str, W: Tensor, S: Tensor, A: Tensor, B: Tensor) -> LayerChange:
    """How much of the change from ``W`` to ``S`` is norm, how much rotation, and what the angles ``A B`` keep of it."""
    w, s = W.flatten(1).double(), S.flatten(1).double()
    norm_w, norm_s = w.norm(dim=1).clamp_min(1e-30), s.norm(dim=1).clamp_min(1e-30)
    cosine = (w * s).sum(1) / (norm_w * norm_s)
    theta, before, after = angles_between(W, S), pairs(W), pairs(S)
    whole = (after - before).abs().square().sum()

    def left(angles: Tensor) -> float:
        turned = before * torch.polar(torch.ones_like(angles), angles)
        return float((after - turned).abs().square().sum() / whole) if whole else 0.0

    return LayerChange(
        name=name,
        norm_change=float(((norm_s - norm_w).abs() / norm_w).mean()),
        direction_change=float((1 - cosine).mean()),
        angle_rms=float(theta.square().mean().sqrt()),
        change=float((s - w).norm() / w.norm().clamp_min(1e-30)),
        rotation=1 - left(theta),
        kept=1 - left(A.double() @ B.double()),
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------------


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
        student: likewise, or a safetensors file of the network alone.
        target_modules: regular expression over module names; None = the family's default for students.
        timestep: at which the student is asked; None = what the student's scheduler says, or the last of the teacher's.
    Raises:
        WadiError: if the two are of different architectures, one cannot be read, or ``out`` exists.
    """
    check_out(out)
    source = resolve_teacher(teacher)
    network, targets = _skeleton(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    before, after = network_weights(source), network_weights(resolve_teacher(student))
    check_same_tensors(shapes, before, f"Teacher {teacher!r}", "its own config")
    check_same_tensors(shapes, after, f"Student {student!r}", f"teacher {teacher!r}")
    names = _attach(network, target_modules or targets, rank)
    found = Extraction(rank, timestep or _timestep(source, student), *_fill(network, names, before, after, rank))
    about = {"timestep": found.timestep, "teacher": teacher, "extracted_from": student}
    with whole_folder(out) as folder:
        roles.write(network, NAME, folder)
        (folder / "wadi.json").write_text(json.dumps(about, indent=2) + "\n")
        (folder / "extraction.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
    return found


def _skeleton(path: str) -> tuple[nn.Module, str]:
    """The network of a pipeline without contents, and the layers that a student's adapter goes on."""
    backbone = family(str(pipeline_index(path).get("_class_name")))
    config = read_config(path, backbone.component)
    with torch.device("meta"):
        network: Any = build_network(config)
    return network, backbone.default_targets(network.config)[0]


def _attach(network: nn.Module, targets: str, rank: int) -> list[str]:
    from wadi.lorad import LoRaDConfig

    with torch.device("meta"):
        return roles.attach(network, NAME, LoRaDConfig(r=rank, target_modules=targets))


def _fill(
    network: nn.Module, names: list[str], before: LazyTensors, after: LazyTensors, rank: int
) -> tuple[list[LayerChange], list[str]]:
    """Set the angles of every adapted layer; ``(changes, names of tensors that changed elsewhere)``."""
    changes = []
    for name in names:
        W, S = before[f"{name}.weight"], after[f"{name}.weight"]
        for whose, tensor in (("The teacher", W), ("The student", S)):
            check_finite(whose, {f"{name}.weight": tensor})
        A, B = factors(angles_between(W, S), rank)
        layer: Any = network.get_submodule(name)
        set_factors(layer, NAME, A, B)
        changes.append(measure(name, W, S, A, B))
    adapted = {f"{name}.weight" for name in names}
    outside = [name for name in before if name not in adapted and not torch.equal(before[name].float(), after[name].float())]
    return changes, sorted(outside)


def _timestep(teacher: str, student: str) -> int:
    """Return the timestep that the student's scheduler holds if `wadi export` wrote it, otherwise the teacher's last."""
    if not Path(student).is_file():
        stored = stored_timestep(read_config(resolve_teacher(student), "scheduler"))
        if stored is not None:
            return stored
    if not Path(teacher).is_file():
        return timestep_of(make_scheduler(read_config(resolve_teacher(teacher), "scheduler")))
    raise WadiError(f"Neither {student!r} nor {teacher!r} has a scheduler. Expected --timestep.")


def describe(found: Extraction, layers: int = 10) -> str:
    """The extraction as lines of text: the layers that changed most, and the whole."""
    columns = ("norm_change", "direction_change", "angle_rms", "rotation", "kept")
    lines = [f"{'layer':<64}" + "".join(f"{column:>18}" for column in columns)]
    for layer in sorted(found.layers, key=lambda layer: -layer.change)[:layers]:
        lines.append(f"{layer.name[-63:]:<64}" + "".join(f"{getattr(layer, column):18.5f}" for column in columns))
    lines.append(f"... of {len(found.layers)} layers, the {min(layers, len(found.layers))} that changed most")
    lines.append(
        f"Of the squared change of these layers {found.rotation:.1%} is rotation within pairs, {1 - found.rotation:.1%} their "
        f"norms; rank {found.rank} keeps {found.kept:.1%}."
    )
    if found.outside:
        lines.append(
            f"{len(found.outside)} tensors changed that have no angles (first: {found.outside[0]}); the adapter leaves them as "
            "they are in the teacher."
        )
    lines.append(f"Student's timestep: {found.timestep}.")
    return "\n".join(lines)
