"""Before a run: which layers each role adapts, how many numbers it trains, and the memory a step takes. No weights are read.

Networks are built from their configs on the meta device: those of the presets from ``architectures/`` (public values of the
models' own config files), a teacher's from its ``config.json``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi import roles
from wadi.backbones import Backbone, family
from wadi.backbones.configs import build_network, check_config, pipeline_index, read_config
from wadi.backbones.load_errors import explain_run_errors
from wadi.backbones.outline import Outline
from wadi.diffusion.schedulers import make_scheduler
from wadi.distill.config import DistillConfig
from wadi.distill.plan.memory import peak_bytes
from wadi.distill.setup import attach_roles
from wadi.errors import WadiError, first_line, short_repr
from wadi.io.quiet import errors_only
from wadi.io.records import read_json
from wadi.sampling import student_timestep
from wadi.zoo.paths import resolve_teacher

ARCHITECTURES = Path(__file__).parent / "architectures"
FLOAT32 = 4  # bytes
MOMENTS = 2  # of AdamW, per parameter
MOMENT_BYTES = {"adamw": FLOAT32, "adamw8bit": 1}


@dataclass(frozen=True)
class Architecture:
    """A model as its config files tell it.

    Attributes:
        model: its name.
        pipeline: class of its pipeline.
        vae_scale_factor: pixels per latent, each way.
        network, scheduler: configs.
        other_parameters: parameters of text encoders and autoencoder, by component; they lie beside the network.
    """

    model: str
    pipeline: str
    vae_scale_factor: int
    network: dict[str, Any]
    scheduler: dict[str, Any]
    other_parameters: dict[str, int]


@dataclass(frozen=True)
class Role:
    """``layers`` (names) that a role adapts at ``rank``, and what it trains: ``sum of r (out + fan_in // 2)``."""

    rank: int
    parameters: int
    layers: list[str]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the largest moment of a step; ``activations`` is all that is in none of the others."""

    network: int
    encoders: int
    angles: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What `plan` found. ``memory`` is with and without gradient checkpointing."""

    model: str
    parameters: int
    resolution: tuple[int, int]
    timestep: int
    amplification: float
    batch: int
    images: int
    processes: int
    dtype: str
    gradient_checkpointing: bool
    student: Role
    fake: Role
    memory: dict[str, Memory]


def architectures() -> list[str]:
    """Names of the architectures that come with the package: presets of the same name use them."""
    return sorted(path.stem for path in ARCHITECTURES.glob("*.json"))


def architecture(name: str) -> Architecture:
    """One of `architectures`."""
    return read_json(ARCHITECTURES / f"{name}.json", Architecture, "Architecture")


def architecture_of(teacher: str) -> Architecture:
    """What the config files of a pipeline folder or Hub id tell; no weight is read.

    Raises:
        WadiError: if it is no pipeline, no family serves it, or the Hub cannot deliver it.
    """
    path = resolve_teacher(teacher)
    index = pipeline_index(path)
    backbone = family(str(index.get("_class_name")))
    names = sorted(name for name in index if re.match(r"text_encoder|vae", name))
    parts = {name: part for name in names if (part := _part(teacher, name, index[name])) is not None}
    return Architecture(
        model=teacher,
        pipeline=str(index["_class_name"]),
        vae_scale_factor=2 ** (_levels(teacher, read_config(path, "vae")) - 1),
        network=read_config(path, backbone.component),
        scheduler=read_config(path, "scheduler"),
        other_parameters={name: _count(path, name, part) for name, part in parts.items()},
    )


def _part(teacher: str, name: str, value: Any) -> tuple[str, str] | None:
    """``(library, class)`` of a component as ``model_index.json`` names it; None if the pipeline has none, or for a setting.

    Raises:
        WadiError: if it is something else.
    """
    if not isinstance(value, (list, tuple)) or (len(value) == 2 and value[0] is None):
        return None
    if len(value) == 2 and all(isinstance(word, str) for word in value):
        return value[0], value[1]
    raise WadiError(
        f"model_index.json of {teacher!r} has {short_repr(value)} under {name!r}. It must name a library and a class."
    )


def _levels(teacher: str, vae: dict[str, Any]) -> int:
    """Resolutions within an autoencoder, each half the one before."""
    widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 16:
        raise WadiError(
            f"The config of the vae of {teacher!r} has {short_repr(widths)} under 'block_out_channels'. It must list one to 16 "
            "widths: restore the file."
        )
    return len(widths)


def _count(path: str, component: str, place: tuple[str, str]) -> int:
    """Parameters of a text encoder or autoencoder, built from its config on the meta device.

    Raises:
        WadiError: if its library has no such class, or the class does not take the config.
    """
    library, name = place
    config = read_config(path, component)
    if library == "diffusers":
        with torch.device("meta"):
            model: Any = build_network({**config, "_class_name": name})
    else:
        import transformers

        check_config(config, f"The config of {component}")
        model_class = getattr(transformers, name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise WadiError(f"model_index.json of {path!r} names {name!r} for {component}. It must be a model of transformers.")
        try:
            with torch.device("meta"), errors_only():
                config_class: Any = model_class.config_class
                model = model_class(config_class(**config))
        except Exception as error:  # each class has its own way to refuse a setting
            raise WadiError(
                f"The {component} of {path!r} cannot be built from its config: {type(error).__name__}: {first_line(error)}. "
                "Compare its config.json with that of the original model."
            ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def outline(found: Architecture, config: DistillConfig) -> Backbone:
    """The backbone of an architecture on the meta device, with both roles attached.

    Raises:
        WadiError: if targets match nothing, or the resolution is one that the model cannot draw.
    """
    backbone_class = family(found.pipeline)
    with torch.device("meta"), errors_only():  # casting a network without any module to keep in float32 is remarked on
        network = build_network(found.network).to(getattr(torch, config.dtype))
    stand_in = Outline(
        pipeline_class=found.pipeline,
        scheduler=make_scheduler(found.scheduler),
        vae_scale_factor=found.vae_scale_factor,
        config={},
        **{backbone_class.component: network},
    )
    backbone = backbone_class(stand_in, config.resolution)
    with torch.device("meta"):
        attach_roles(backbone, config)
    return backbone


def role_of(backbone: Backbone, role: str, rank: int) -> Role:
    """What is attached for a role."""
    angles = roles.parameters(backbone.network, role)
    return Role(rank, sum(parameter.numel() for parameter in angles.values()), roles.adapted_layers(backbone.network, role))


def plan(config: DistillConfig, found: Architecture, processes: int = 1) -> Plan:
    """Layers, trainable parameters and memory of a run of ``config`` on an architecture.

    Raises:
        WadiError: see `outline`; or if ``processes`` is below 1.
    """
    if processes < 1:
        raise WadiError(f"processes is {processes}. Expected at least 1.")
    memory = {}
    for name, checkpointing in (("checkpointed", True), ("plain", False)):
        backbone = outline(found, replace(config, gradient_checkpointing=checkpointing))
        timestep = student_timestep(backbone, config.student.timestep)
        student = role_of(backbone, "student", config.student.rank)
        fake = role_of(backbone, "fake", config.fake.rank)
        trainable = student.parameters + fake.parameters
        parameters = sum(parameter.numel() for parameter in backbone.network.parameters()) - trainable
        memory[name] = memory_of(backbone, config, timestep, found, processes)
    at = torch.tensor([timestep])
    amplification = float(backbone.process.sigma(at) / backbone.process.alpha(at).clamp_min(1e-12))
    return Plan(
        model=found.model,
        parameters=parameters,
        resolution=backbone.resolution,
        timestep=timestep,
        amplification=amplification if backbone.process.prediction == "epsilon" else float(backbone.process.sigma(at)),
        batch=config.batch,
        images=config.batch * config.accumulate * processes,
        processes=processes,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        student=student,
        fake=fake,
        memory=memory,
    )


def memory_of(backbone: Backbone, config: DistillConfig, timestep: int, found: Architecture, processes: int = 1) -> Memory:
    """Of one process. The network is used up by it: its parameters have no contents afterwards."""
    width = torch.empty(0, dtype=getattr(torch, config.dtype)).element_size()
    angles = {role: list(roles.parameters(backbone.network, role).values()) for role in ("student", "fake")}
    counts = {role: sum(parameter.numel() for parameter in own) for role, own in angles.items()}
    both = FLOAT32 * sum(counts.values())
    averaged = FLOAT32 * counts["student"] if config.student.ema else 0
    network = _bytes(backbone.network)
    gradients = FLOAT32 * counts["student"]
    with explain_run_errors(f"No step of {found.model!r} can be computed"):
        peak = peak_bytes(backbone, config, backbone.condition_shapes(), timestep)
    rest = peak - network - both - averaged - MOMENTS * both - gradients
    if config.shard:  # a share of everything, and the block at work whole
        network = network // processes + max((_bytes(block) for block in _blocks(backbone.network)), default=network)
    return Memory(
        network=network,
        encoders=width * sum(found.other_parameters.values()),
        angles=both + averaged,
        optimizer=MOMENTS * MOMENT_BYTES[config.optimizer] * sum(counts.values()),
        gradients=gradients,
        activations=rest,
    )


def _bytes(module: nn.Module) -> int:
    """Of parameters and buffers, angles left out."""
    return sum(tensor.numel() * tensor.element_size() for tensor in roles.base_tensors(module).values())


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once of a sharded network."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


# --- telling it -------------------------------------------------------------------------------------------------------------


def to_dict(planned: Plan) -> dict[str, Any]:
    """Plain values for JSON; memory in bytes."""
    values = asdict(planned)
    values["memory"] = {name: {**asdict(memory), "total": memory.total} for name, memory in planned.memory.items()}
    return values


def describe(planned: Plan) -> str:
    """The plan as lines of text."""
    height, width = planned.resolution
    lines = [
        f"{planned.model}: {planned.parameters / 1e6:,.2f} M parameters, images of {height} x {width}",
        f"student asked at t = {planned.timestep}, where an error of the network counts {planned.amplification:.1f}-fold",
        "",
    ]
    for name, role in (("student", planned.student), ("fake", planned.fake)):
        share = role.parameters / planned.parameters
        lines.append(f"{name}: rank {role.rank}, {len(role.layers)} layers, {role.parameters:,} trainable ({share:.1%})")
        lines += [f"  {count:4d} x {kind}" for kind, count in kinds(role.layers).items()]
    batch = f"batch {planned.batch}, {planned.dtype}, {planned.processes} process(es), {planned.images} images a step"
    lines += ["", f"memory of a step in GiB, {batch}; of each process:"]
    columns = list(planned.memory.values())
    lines.append(f"  {'gradient checkpointing':<24}{'on':>10}{'off':>10}")
    for part in vars(columns[0]):
        lines.append(f"  {part:<24}" + "".join(f"{getattr(column, part) / 2**30:10.2f}" for column in columns))
    lines.append(f"  {'total':<24}" + "".join(f"{column.total / 2**30:10.2f}" for column in columns))
    lines += [
        "",
        "Not counted: kernels' workspaces and the CUDA context, and sample grids, which decode 16 images at once.",
        "Text encoders need not be there when prompts come from a folder of `wadi embed`.",
    ]
    return "\n".join(lines)


def kinds(layers: list[str]) -> dict[str, int]:
    """Layers counted by their name without the numbers and places of blocks: ``attn1.to_q``, ``ff.net.2``, ..."""
    return dict(Counter(re.sub(r"^.*(blocks|attentions|resnets)\.\d+\.", "", name) for name in layers).most_common())
