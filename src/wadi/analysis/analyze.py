"""Teacher against student, layer by layer: two networks of any size in the memory of a few layers.

A layer is a tensor ``NAME.weight`` of two dimensions or more (``Linear``, convolution, embedding) that both networks have, in
one shape. Biases and the weights of norms have no rows; of those it is only told which changed.
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
from wadi.analysis.change import compare_rows
from wadi.analysis.kinds import KINDS, block, depth, kind
from wadi.analysis.sources import Adapted, Network, open_student, open_teacher
from wadi.backbones.weights import LazyTensors
from wadi.errors import WadiError
from wadi.io.progress import progress


@dataclass(frozen=True)
class Layer:
    """One layer's change; definitions in `wadi.analysis.change` and `wadi.analysis.spectrum`.

    Attributes:
        shape: of the weight as a matrix, ``(out, fan_in)``.
        undefined: rows of zero norm, left out of all that needs a direction.
        norm_mean, norm_std: over rows; None if no row has a norm. Standard deviations are those of the population.
        direction_mean, direction_std: likewise.
        energy: cumulative energy of the residual at `spectrum.FRACTIONS` of full rank; None if all of it is rounding.
        energy_30: at 30 % of full rank; ``energy_missing``: by how much the truth may be larger (0 if exact).
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
    energy: tuple[float | None, ...] | None
    energy_30: float | None
    energy_missing: float
    exact: bool
    angles: Angles | None = None


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        layers: from input to output as far as their names tell.
        only_in_teacher, only_in_student, reshaped: names of tensors that could not be compared.
        changed_elsewhere: names of tensors that are no layers (biases, norms) and differ.
    """

    teacher: str
    student: str
    layers: list[Layer]
    only_in_teacher: list[str] = field(default_factory=list)
    only_in_student: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    changed_elsewhere: list[str] = field(default_factory=list)

    def mean(self, figure: str, of: Sequence[Layer] | None = None) -> float | None:
        """Mean of a figure over the layers (``of`` some, or all) that have it, the paper's star; None if none has."""
        found = [value for layer in (self.layers if of is None else of) if (value := getattr(layer, figure)) is not None]
        return fmean(found) if found else None

    def by(self, key: str) -> dict[str, list[Layer]]:
        """Layers by ``kind`` (in the order of `KINDS`) or by ``block`` (from input to output)."""
        order = KINDS if key == "kind" else dict.fromkeys(layer.block for layer in self.layers)
        groups = {name: [layer for layer in self.layers if getattr(layer, key) == name] for name in order}
        return {name: group for name, group in groups.items() if group}

    @property
    def adapted(self) -> list[Layer]:
        """Layers with angles."""
        return [layer for layer in self.layers if layer.angles is not None]


def analyze(
    teacher: str, student: str, exact_up_to: int = spectrum.EXACT_UP_TO, device: torch.device | str = "cpu"
) -> Analysis:
    """Compare two networks.

    Args:
        teacher: pipeline folder or Hub id, safetensors file, or 'zoo'.
        student: likewise, or a run or an adapter folder.
        exact_up_to: shorter side of a layer up to which its spectrum is exact; larger ones are sketched.
        device: where a layer is computed.
    Raises:
        WadiError: if one cannot be read, the two have less than half of their layers in common, or a weight is not finite.
    """
    before = open_teacher(teacher)
    after = open_student(student, before)
    names = common_layers(before, after, f"Teacher {teacher!r}", f"student {student!r}")
    layers = []
    with progress("analysing", len(names), quiet=len(names) < 200) as bar:
        for layer in compare(before, after, names, exact_up_to, device):
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
    """Whether a tensor is the weight of a layer: a matrix or a convolution's kernel."""
    return name.endswith(".weight") and len(network.shape(name)) > 1


def differs(before: LazyTensors, after: Network, name: str) -> bool:
    """Whether two tensors of one shape have different values, each as exact as it is stored."""
    return before.shape(name) == after.shape(name) and not torch.equal(before[name].double(), after[name].double())


def common_layers(before: LazyTensors, after: Network, teacher: str, student: str) -> list[str]:
    """Weights that can be compared, sorted by `depth`.

    Raises:
        WadiError: if they are less than half of either network's: the two are of different families.
    """
    own = [{name for name in network if is_layer(network, name)} for network in (before, after)]
    shared = sorted((n for n in own[0] & own[1] if before.shape(n) == after.shape(n)), key=depth)
    most = max(map(len, own))
    if not shared or 2 * len(shared) < most:
        foreign = next(iter(sorted(own[1] - set(shared))), "none")
        raise WadiError(
            f"{teacher} has {len(own[0])} layers and {student} {len(own[1])}, of which {len(shared)} have the same name and "
            f"shape (another: {foreign}). Expected two networks of one family, in diffusers' names: give the teacher that the "
            "student was made from; a single-file checkpoint is converted by from_single_file(FILE).save_pretrained(FOLDER)."
        )
    return shared


def compare(
    before: LazyTensors,
    after: Network,
    names: Sequence[str],
    exact_up_to: int = spectrum.EXACT_UP_TO,
    device: torch.device | str = "cpu",
) -> Iterator[Layer]:
    """One `Layer` for each of ``names``; nothing of a layer is kept when the next is read."""
    for name in names:
        turned = after.turned(name) if isinstance(after, Adapted) else None
        W = before[name] if turned is None else turned.W
        S = after[name] if turned is None else turned.R
        _refuse_not_finite(name, W, S)
        found = None if turned is None else angles.describe(turned.factor.A, turned.factor.B, turned.theta)
        yield measure(name.removesuffix(".weight"), W, S, found, exact_up_to, device)


def measure(
    name: str,
    W: Tensor,
    S: Tensor,
    found: Angles | None = None,
    exact_up_to: int = spectrum.EXACT_UP_TO,
    device: torch.device | str = "cpu",
) -> Layer:
    """The change of one layer from ``W`` to ``S``, both ``(out, ...)`` of one shape, in any floating dtype."""
    rows = compare_rows(W, S, device)
    shape = (rows.residual.shape[0], rows.residual.shape[1])
    full, energy, at, missing, is_exact = min(shape), None, None, 0.0, True
    # below the square of what the coarser dtype resolves, the residual is the weights' rounding and has no spectrum to speak of
    if len(rows.direction) and float(rows.direction.mean()) > max(torch.finfo(T.dtype).eps for T in (W, S)) ** 2:
        energies, is_exact = spectrum.spectrum(rows.residual, exact_up_to)
        energy = tuple(spectrum.curve(energies, full))
        at, missing = spectrum.energy_at(energies, full)
    return Layer(
        name, kind(name, W.ndim), block(name), shape, rows.undefined, *_mean_and_std(rows.norm),
        *_mean_and_std(rows.direction), energy, at, missing, is_exact, found,
    )  # fmt: skip


def _mean_and_std(values: Tensor) -> tuple[float | None, float | None]:
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (None, None)


def _refuse_not_finite(name: str, W: Tensor, S: Tensor) -> None:
    for whose, tensor in (("Teacher", W), ("Student", S)):
        if not tensor.is_floating_point():
            raise WadiError(f"{whose}'s {name} is of type {tensor.dtype}. Expected weights that are not quantised.")
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have no such test
        if not wide.isfinite().all():
            count = int((~wide.isfinite()).sum())
            raise WadiError(
                f"{whose}'s {name} has {count} values that are not finite, of {tensor.numel()}. Expected finite weights: the "
                "training that made them diverged, or the file is damaged."
            )


def groups_table(found: Analysis, key: str) -> list[dict[str, Any]]:
    """Means by ``kind`` or ``block``: what the figures and tables by group show."""
    figures = ("norm_mean", "norm_std", "direction_mean", "direction_std", "energy_30")
    return [
        {key: name, "layers": len(group), **{figure: found.mean(figure, group) for figure in figures}}
        for name, group in found.by(key).items()
    ]
