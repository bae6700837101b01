"""Plan a run: the layers that each role adapts, the number of trained parameters, the memory of a step. No weights are read.

The network is built from its config on the meta device, with both roles attached.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from wadi import roles
from wadi.backbones import Backbone, family
from wadi.backbones.configs import build_network
from wadi.backbones.load_errors import explain_run_errors
from wadi.backbones.outline import Outline
from wadi.diffusion.schedulers import make_scheduler
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.objectives import make_objective, with_defaults
from wadi.distill.plan.architecture import Architecture
from wadi.distill.plan.memory import Untraceable, peak_bytes
from wadi.distill.setup import attach_roles
from wadi.errors import WadiError
from wadi.io.quiet import errors_only
from wadi.parallel.device import dtype_of
from wadi.sampling import student_timesteps

FLOAT32 = 4  # bytes
MOMENTS = 2  # AdamW keeps two numbers per parameter
MOMENT_BYTES = {"adamw": FLOAT32, "adamw8bit": 1}


@dataclass(frozen=True)
class RolePlan:
    """Names of the ``layers`` that a role adapts, the method and rank of its adapter, and its number of trained parameters."""

    adapter: str
    rank: int | None
    parameters: int
    layers: list[str]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step. ``activations`` is everything that the other fields do not count.

    It is None if it is unknown, see `Plan.unknown`.
    """

    network: int
    encoders: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int | None

    @property
    def known(self) -> int:
        """Return the sum of the fields that are known."""
        return sum(value for value in vars(self).values() if value is not None)

    @property
    def total(self) -> int | None:
        """Return the sum of all fields; None if one is unknown."""
        return None if self.activations is None else self.known


@dataclass(frozen=True)
class Plan:
    """The result of `plan_run`.

    Attributes:
        parameters: number of the network's parameters without adapters.
        timesteps: at which the student generates.
        amplification: factor by which an error of the network's prediction at the first of them is multiplied in the
            student's image.
        batch, images: images that a process evaluates at once; images per step on all processes.
        memory: with gradient checkpointing (``"checkpointed"``) and without (``"plain"``).
        unknown: why the activations are unknown; empty if they are known.
    """

    model: str
    parameters: int
    resolution: tuple[int, int]
    timesteps: tuple[int, ...]
    amplification: float
    batch: int
    images: int
    processes: int
    dtype: str
    gradient_checkpointing: bool
    student: RolePlan
    fake: RolePlan | None
    memory: dict[str, Memory]
    unknown: str = ""


def plan_run(config: DistillConfig, architecture: Architecture, processes: int = 1) -> Plan:
    """Return the plan of a run of ``config`` with a teacher of this architecture.

    Raises:
        WadiError: see `outline_backbone`; or if ``processes`` is below 1.
    """
    if processes < 1:
        raise WadiError(f"processes is {processes}. It must be at least 1.")
    config = with_defaults(config)
    memory, unknown = {}, ""
    for name, checkpointing in (("checkpointed", True), ("plain", False)):
        backbone = outline_backbone(architecture, replace(config, gradient_checkpointing=checkpointing))
        timesteps = student_timesteps(backbone, config.student.timesteps)
        student = plan_role(backbone, "student", config.student)
        fake = plan_role(backbone, "fake", config.fake) if "fake" in roles.attached(backbone.network) else None
        parameters = sum(parameter.numel() for parameter in backbone.network.parameters()) - _count_adapters(backbone.network)
        memory[name], unknown = measure_memory(backbone, config, timesteps[0], architecture, processes)
    at = torch.tensor(timesteps[:1])
    amplification = float(backbone.process.sigma(at) / backbone.process.alpha(at).clamp_min(1e-12))
    return Plan(
        model=architecture.model,
        parameters=parameters,
        resolution=backbone.resolution,
        timesteps=timesteps,
        amplification=amplification if backbone.process.prediction == "epsilon" else float(backbone.process.sigma(at)),
        batch=config.batch,
        images=config.batch * config.accumulate * processes,
        processes=processes,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        student=student,
        fake=fake,
        memory=memory,
        unknown=unknown,
    )


def outline_backbone(architecture: Architecture, config: DistillConfig) -> Backbone:
    """Return the backbone of an architecture on the meta device, with both roles attached.

    Raises:
        WadiError: if the target modules match no layer, or the model cannot generate images of this resolution.
    """
    backbone_class = family(architecture.pipeline)
    with torch.device("meta"), errors_only():  # diffusers warns about a network that has no module to keep in float32
        network = build_network(architecture.network).to(dtype_of(config.dtype))
    stand_in = Outline(
        pipeline_class=architecture.pipeline,
        scheduler=make_scheduler(architecture.scheduler),
        vae_scale_factor=architecture.vae_scale_factor,
        config={},
        **{backbone_class.component: network},
    )
    with explain_run_errors(f"The family of {architecture.pipeline} cannot be planned"):
        backbone = backbone_class(stand_in, config.resolution)
    # BOFT computes with its first values, which tensors without contents do not allow
    boft = "boft" in (config.student.adapter, config.fake.adapter)
    with torch.device("cpu" if boft else "meta"):
        attach_roles(backbone, config)
    return backbone


def plan_role(backbone: Backbone, role: str, settings: StudentConfig | FakeConfig) -> RolePlan:
    """Return the layers and the number of parameters of an attached role."""
    trained = roles.trained_parameters(backbone.network, role).values()
    count = sum(parameter.numel() for parameter in trained)
    return RolePlan(settings.adapter, settings.rank, count, roles.adapted_layers(backbone.network, role))


def measure_memory(
    backbone: Backbone, config: DistillConfig, timestep: int, architecture: Architecture, processes: int = 1
) -> tuple[Memory, str]:
    """Return the memory of a step on one process, and why the activations are unknown (empty if they are known).

    The backbone's parameters lose their contents.
    """
    width = torch.empty(0, dtype=dtype_of(config.dtype)).element_size()
    objective = make_objective(config)
    counts = {
        role: sum(parameter.numel() for parameter in roles.trained_parameters(backbone.network, role).values())
        for role in ("student", "fake")
    }
    adapters = FLOAT32 * _count_adapters(backbone.network)
    average = FLOAT32 * counts["student"] if config.student.ema else 0
    network = _count_bytes(backbone.network)
    gradients = FLOAT32 * counts["student"]
    peak, unknown = None, ""
    if type(backbone).condition_shapes is Backbone.condition_shapes:
        unknown = f"{type(backbone).__name__} has no method condition_shapes()"
    else:
        try:
            with explain_run_errors(f"No step of {architecture.model!r} can be computed"):
                peak = peak_bytes(backbone, config, objective, backbone.condition_shapes(), timestep)
        except Untraceable as error:
            unknown = f"what {type(backbone.network).__name__} computes depends on numbers ({error})"
    moments = MOMENTS * FLOAT32 * sum(counts.values())
    rest = None if peak is None else peak - network - adapters - average - moments - gradients
    if config.shard:  # each process keeps its share, and gathers one block at a time
        network = network // processes + max((_count_bytes(block) for block in _blocks(backbone.network)), default=network)
    memory = Memory(
        network=network,
        encoders=width * sum(architecture.other_parameters.values()),
        adapters=adapters + average,
        optimizer=MOMENTS * MOMENT_BYTES[config.optimizer] * sum(counts.values()),
        gradients=gradients,
        activations=rest,
    )
    return memory, unknown


def _count_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers without the adapters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in roles.base_tensors(module).values())


def _count_adapters(network: nn.Module) -> int:
    """Return the number of parameters of all adapters, trained or not."""
    return sum(parameter.numel() for role in roles.attached(network) for parameter in roles.parameters(network, role).values())


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a sharded network, each of which is gathered as a whole."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values for JSON; memory in bytes."""
    values = asdict(plan)
    values["memory"] = {name: {**asdict(memory), "total": memory.total} for name, memory in plan.memory.items()}
    return values
