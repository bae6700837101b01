"""Compare a teacher with a student layer by layer. Two networks of any size need the memory of a few layers.

A layer is a tensor ``NAME.weight`` with two dimensions or more (``Linear``, convolution, embedding) that both networks have,
in the same shape. Biases and the weights of norms have no rows; the analysis only lists which of them changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from wadi.analysis import angles, spectrum
from wadi.analysis.angles import Angles
from wadi.analysis.kinds import KINDS, block, depth, kind
from wadi.analysis.sources import AdaptedNetwork, Network, open_student, open_teacher
from wadi.backbones.lazy_tensors import LazyTensors
from wadi.errors import WadiError
from wadi.io.progress import progress
from wadi.roles.change import angles_of, compare_rows, norm_change_of_noise


@dataclass(frozen=True)
class Layer:
    """The change of one layer. `wadi.roles.change` and `wadi.analysis.spectrum` have the definitions.

    Attributes:
        shape: of the weight as a matrix, ``(out, fan_in)``.
        undefined: rows of zero norm, which are left out wherever a direction is needed.
        norm_mean, norm_std: over rows; None if no row has a norm. Standard deviations are those of the population.
        direction_mean, direction_std: the same for the direction.
        angle_mean: mean over rows of the angle between teacher and student, in radians.
        norm_chance: the norm change that noise with the same direction changes would have.
        energy: cumulative energy of the residual at `spectrum.FRACTIONS` of full rank; None if the residual is only rounding.
        energy_30: cumulative energy at 30 % of full rank.
        energy_missing: by how much the true ``energy_30`` may be larger; 0 if exact.
        angles: of a LoRaD student, where the adapter is on this layer.
    """

    name: str
    kind: str
    block: str
    shape: tuple[int, int]
    undefined: int
    norm_mean: float | None
    norm_std: float | None
    direction_mean: float | None
    direction_std: float | None
    angle_mean: float | None
    norm_chance: float | None
    energy: tuple[float | None, ...] | None
    energy_30: float | None
    energy_missing: float
    exact: bool
    angles: Angles | None = None


@dataclass(frozen=True)
class Analysis:
    """The result of `analyze`.

    Attributes:
        layers: from input to output, as far as their names show it.
        only_in_teacher, only_in_student, reshaped: names of tensors that could not be compared.
        changed_elsewhere: names of tensors that changed and are not layers (biases, norms).
    """

    teacher: str
    student: str
    layers: list[Layer]
    only_in_teacher: list[str] = field(default_factory=list)
    only_in_student: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    changed_elsewhere: list[str] = field(default_factory=list)

    def mean(self, metric: str, layers: Sequence[Layer] | None = None) -> float | None:
        """Return the mean of a metric over the layers that have it (all, or those in ``layers``), or None if none has."""
        values = [
            value for layer in (self.layers if layers is None else layers) if (value := getattr(layer, metric)) is not None
        ]
        return fmean(values) if values else None

    def by(self, key: str) -> dict[str, list[Layer]]:
        """Group the layers by ``kind`` (in the order of `KINDS`) or by ``block`` (from input to output)."""
        order = KINDS if key == "kind" else dict.fromkeys(layer.block for layer in self.layers)
        groups = {name: [layer for layer in self.layers if getattr(layer, key) == name] for name in order}
        return {name: group for name, group in groups.items() if group}

    @property
    def adapted(self) -> list[Layer]:
        """The layers that have angles."""
        return [layer for layer in self.layers if layer.angles is not None]


def analyze(
    teacher: str, student: str, exact_up_to: int = spectrum.EXACT_UP_TO, device: torch.device | str = "cpu"
) -> Analysis:
    """Compare two networks.

    Args:
        teacher: pipeline folder or Hub id, safetensors file, or 'zoo'.
        student: the same, or a run or an adapter folder.
        exact_up_to: shorter side of a layer up to which its spectrum is exact; larger ones are sketched.
        device: where a layer is computed.
    Raises:
        WadiError: if one cannot be read, the two share less than half of their layers, or a weight is not finite.
    """
    before = open_teacher(teacher)
    after = open_student(student, before)
    names = common_layers(before, after, f"Teacher {teacher!r}", f"student {student!r}")
    layers = []
    with progress("comparing layers", len(names), quiet=len(names) < 200) as bar:
        for layer in compare_layers(before, after, names, exact_up_to, device):
            layers.append(layer)
            bar.advance()
    shared = before.keys() & after.keys()
    return Analysis(
        teacher,
        student,
        layers,
        sorted(before.keys() - after.keys()),
        sorted(after.keys() - before.keys()),
        sorted(name for name in shared if before.shape(name) != after.shape(name)),
        sorted(name for name in shared if not is_layer(before, name) and differs(before, after, name)),
    )


def is_layer(network: Network, name: str) -> bool:
    """Return whether a tensor is the weight of a layer: a matrix or the kernel of a convolution."""
    return name.endswith(".weight") and len(network.shape(name)) > 1


def differs(before: LazyTensors, after: Network, name: str) -> bool:
    """Return whether two tensors of the same shape have different values, compared in float64."""
    return before.shape(name) == after.shape(name) and not torch.equal(before[name].double(), after[name].double())


def common_layers(before: LazyTensors, after: Network, teacher: str, student: str) -> list[str]:
    """Return the names of the weights that both networks have in the same shape, sorted by `depth`.

    Raises:
        WadiError: if these are less than half of either network's layers, which means two different families.
    """
    layers_of = [{name for name in network if is_layer(network, name)} for network in (before, after)]
    shared = sorted((n for n in layers_of[0] & layers_of[1] if before.shape(n) == after.shape(n)), key=depth)
    larger = max(map(len, layers_of))
    if not shared or 2 * len(shared) < larger:
        other = next(iter(sorted(layers_of[1] - set(shared))), "none")
        raise WadiError(
            f"{teacher} has {len(layers_of[0])} layers and {student} has {len(layers_of[1])}, but only {len(shared)} have the "
            f"same name and shape (not shared: {other}). Give two networks of one family, in diffusers' names: the student and "
            "the teacher that it was made from. A single-file checkpoint becomes a folder by "
            "from_single_file(FILE).save_pretrained(FOLDER)."
        )
    return shared


def compare_layers(
    before: LazyTensors,
    after: Network,
    names: Sequence[str],
    exact_up_to: int = spectrum.EXACT_UP_TO,
    device: torch.device | str = "cpu",
) -> Iterator[Layer]:
    """Yield one `Layer` for each of ``names``. Only one layer is in memory at a time."""
    for name in names:
        rotated = after.rotated_layer(name) if isinstance(after, AdaptedNetwork) else None
        W = before[name] if rotated is None else rotated.W
        S = after[name] if rotated is None else rotated.R
        _check_finite(name, W, S)
        layer_angles = None if rotated is None else angles.describe(rotated.factor.A, rotated.factor.B, rotated.theta)
        yield measure_layer(name.removesuffix(".weight"), W, S, layer_angles, exact_up_to, device)


def measure_layer(
    name: str,
    W: Tensor,
    S: Tensor,
    layer_angles: Angles | None = None,
    exact_up_to: int = spectrum.EXACT_UP_TO,
    device: torch.device | str = "cpu",
) -> Layer:
    """Return the change of one layer from ``W`` to ``S``, both ``(out, ...)`` in the same shape and any floating dtype."""
    rows = compare_rows(W, S, device)
    shape = (rows.residual.shape[0], rows.residual.shape[1])
    full, energy, energy_30, missing, is_exact = min(shape), None, None, 0.0, True
    # Below the square of the coarser dtype's resolution, the residual is only rounding, and its spectrum means nothing.
    if len(rows.direction) and float(rows.direction.mean()) > max(torch.finfo(T.dtype).eps for T in (W, S)) ** 2:
        energies, is_exact = spectrum.spectrum(rows.residual, exact_up_to)
        energy = tuple(spectrum.curve(energies, full))
        energy_30, missing = spectrum.energy_at(energies, full)
    return Layer(
        name, kind(name, W.ndim), block(name), shape, rows.undefined, *_mean_and_std(rows.norm),
        *_mean_and_std(rows.direction), _mean_and_std(angles_of(rows.direction))[0],
        _mean_and_std(norm_change_of_noise(rows.direction, shape[1]))[0], energy, energy_30, missing, is_exact, layer_angles,
    )  # fmt: skip


def _mean_and_std(values: Tensor) -> tuple[float | None, float | None]:
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (None, None)


def _check_finite(name: str, W: Tensor, S: Tensor) -> None:
    for network_name, tensor in (("Teacher", W), ("Student", S)):
        if not tensor.is_floating_point():
            raise WadiError(f"{network_name}'s {name} has dtype {tensor.dtype}. Give weights that are not quantised.")
        values = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have no such test
        if not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            raise WadiError(
                f"{network_name}'s {name} has NaN or infinity in {count} of {tensor.numel()} values. Training diverged, or the "
                "file is damaged. Give another checkpoint."
            )


def groups_table(analysis: Analysis, key: str) -> list[dict[str, Any]]:
    """Return the means by ``kind`` or ``block``, as figures and tables show them."""
    metrics = ("norm_mean", "norm_std", "norm_chance", "direction_mean", "direction_std", "angle_mean", "energy_30")
    return [
        {key: name, "layers": len(group), **{metric: analysis.mean(metric, group) for metric in metrics}}
        for name, group in analysis.by(key).items()
    ]
