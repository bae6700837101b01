"""Prepare a run: load the teacher, attach the adapters of both roles, read the prompts, and check that everything fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wadi import roles
from wadi.backbones import Backbone, Condition, check_not_distilled, from_pipeline, load_pipeline
from wadi.backbones.digest import loaded_digest
from wadi.backbones.family_files import use_family
from wadi.distill.batch import images_per_step
from wadi.distill.conditions import Conditions, conditions_of, open_prompts_or_cache
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.objectives import make_objective, objective_class, with_defaults
from wadi.distill.objectives.base import Objective
from wadi.distill.optimizers import initial_state
from wadi.distill.run_folder import REAL_IMAGES, Run
from wadi.distill.samples import captioned_images
from wadi.distill.state import TrainState, fingerprint
from wadi.errors import WadiError
from wadi.io.progress import console
from wadi.lorad.angles import largest_rank
from wadi.parallel.device import dtype_of, find_device, keep_freed_memory, refuse_larger
from wadi.parallel.ranks import Ranks, make_accelerator, shard_frozen
from wadi.prompts.cache import Embeddings
from wadi.prompts.order import PromptOrder
from wadi.prompts.reading import Prompts
from wadi.roles import methods
from wadi.sampling import check_steps, student_timesteps
from wadi.zoo.paths import absolute_source, resolve_teacher


@dataclass
class Training:
    """A run that is ready to start.

    Attributes:
        config: with the teacher named by its absolute path.
        timesteps: at which the student generates, the noisiest first.
        objective: the losses, with their modules on the device.
        fingerprint: of the frozen weights.
        conditions: encodes prompts by their index, or reads their cache.
        null: condition of the null prompt, one row.
        order: in which prompts are drawn.
    """

    config: DistillConfig
    run: Run
    ranks: Ranks
    device: torch.device
    accelerator: Any
    backbone: Backbone
    timesteps: tuple[int, ...]
    objective: Objective
    state: TrainState
    fingerprint: str
    conditions: Conditions
    null: Condition
    order: PromptOrder


def prepare(config: DistillConfig) -> Training:
    """Load and check everything that a run needs. The run's folder is not written. Communicates.

    Raises:
        WadiError: if a setting, the teacher, the prompts or the run's folder cannot be used.
    """
    from accelerate.utils import set_seed

    config = with_defaults(replace(config, teacher=absolute_source(config.teacher)))
    objective = make_objective(config)
    if config.compile and objective.needs_features:
        raise WadiError(
            f"compile is true, and the objective {config.objective!r} with these options uses features of the network, which "
            "compiled code does not give. Set --compile false, or choose an objective without a GAN."
        )
    adapter_configs(config, {"student": "", "fake": ""})  # names unknown adapters and options before anything is loaded
    if config.shard and not objective.generates and config.warm_start.weight > 0:
        raise WadiError(
            f"shard is true and warm_start.weight is {config.warm_start.weight}. With the objective {config.objective!r}, "
            "processes would then evaluate the network at different times. Set --warm-start.weight 0, or --shard false."
        )
    device = find_device(config.device)
    accelerator = make_accelerator(device, config.tracker, Path(config.out))
    ranks = Ranks.of_process_group()
    run = Run(config, ranks)
    console.quiet = ranks.index > 0
    prompts = open_prompts_or_cache(config.prompts, config.prompts_field)
    check_samples(objective, config, prompts, run)
    if ranks.count > 1:
        device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    set_seed(config.seed)  # for the adapters' initial values; everything later draws from the state's own generator

    use_family(config.family, "The run")
    pipeline = load_pipeline(resolve_teacher(config.teacher), dtype_of(config.dtype), device)
    backbone = from_pipeline(pipeline, config.resolution)
    network = backbone.network
    check_not_distilled(pipeline, network)
    timesteps = student_timesteps(backbone, config.student.timesteps)
    check_sizes(backbone, config)
    check_steps(backbone, config.teacher_steps, "teacher_steps")
    if config.warm_start.pairs:
        check_steps(backbone, config.warm_start.sampler_steps, "warm_start.sampler_steps")
    attach_roles(backbone, config)
    objective.build(backbone)
    objective.modules.to(device)
    state = initial_state(network, config, device, ranks, objective)
    state.prompts_digest, state.images_per_step = prompts.digest, images_per_step(config, ranks.count)
    weights = fingerprint(network)
    ranks.on_first(lambda: bool(loaded_digest(pipeline)))  # the other processes then find it in the cache
    state.teacher_digest = loaded_digest(pipeline)
    conditions, null = conditions_of(backbone, prompts), backbone.encode([""])
    order = PromptOrder(len(prompts), config.seed)
    if config.shard:
        shard_frozen(network, [p for role in roles.attached(network) for p in roles.parameters(network, role).values()])
    if config.compile:
        network.compile()
    return Training(
        config, run, ranks, device, accelerator, backbone, timesteps, objective, state, weights, conditions, null, order
    )


def attach_roles(backbone: Backbone, config: DistillConfig) -> None:
    """Attach the adapters of student and fake model. They start from zero, so all three roles still agree.

    An objective without a fake model has only the student.

    Raises:
        WadiError: if the network already has an adapter, no layer matches, a rank is too large, or the network does not support
            gradient checkpointing.
    """
    network = backbone.network
    roles.refuse_adapted(network)
    configs = adapter_configs(config, {"student": backbone.student_targets, "fake": backbone.fake_targets})
    adapter_of = {role: getattr(config, role).adapter for role in configs}
    for role, adapter_config in configs.items():  # before anything of that rank is allocated
        check_rank(network, role, adapter_of[role], adapter_config)
    # LoRaD replaces the weight of a plain layer; the others can also be put around a layer that has an adapter
    for role in sorted(configs, key=lambda role: adapter_of[role] != "lorad"):
        roles.attach(network, role, configs[role], methods.method(adapter_of[role]).frozen)
    network.eval()
    if config.gradient_checkpointing:
        roles.enable_checkpointing(network)


def adapter_configs(config: DistillConfig, targets: Mapping[str, str]) -> dict[str, Any]:
    """Return the PEFT config of each role; an objective without a fake model has only the student.

    Args:
        targets: ``target_modules`` by role where the config has none.
    Raises:
        WadiError: if an adapter or one of its options is unknown, or has a wrong value.
    """
    settings_of: dict[str, StudentConfig | FakeConfig] = {"student": config.student, "fake": config.fake}
    if objective_class(config.objective).fake_defaults is None:
        del settings_of["fake"]
    return {
        role: methods.adapter_config(
            settings.adapter,
            role,
            settings.rank,
            settings.adapter_options,
            settings.target_modules or targets[role],
            recompute=config.recompute,
        )
        for role, settings in settings_of.items()
    }


def check_rank(network: Any, role: str, adapter: str, adapter_config: Any) -> None:
    """Raise `WadiError` if a rank exceeds that of every layer's angles (LoRaD) or weight (the other methods that have one)."""
    if methods.method(adapter).ranks is None:
        return
    largest = largest_rank(network, adapter_config.target_modules, columns=2 if adapter == "lorad" else 1)
    if largest is not None and adapter_config.r > largest:
        raise WadiError(
            f"{role}.rank is {adapter_config.r}. In the largest layer, adapter {adapter!r} has rank {largest} at most: set "
            f"--{role}.rank to that or less."
        )


def check_samples(objective: Objective, config: DistillConfig, prompts: Prompts | Embeddings, run: Run) -> None:
    """Raise `WadiError` if the objective needs images and the config makes none, or names a folder that cannot be used.

    A run that has encoded the folder does not need it any more.
    """
    if not objective.needs_samples:
        return
    if objective.sample_folder is None:
        if not config.warm_start.pairs:
            raise WadiError(
                f"The objective {config.objective!r} with these options learns from samples of the teacher, and "
                "warm_start.pairs is 0. Set --warm-start.pairs, for example to 2048."
            )
        return
    if isinstance(prompts, Embeddings):
        raise WadiError(
            f"The prompts of the images in {objective.sample_folder!r} need the text encoder, but --prompts is the embedding "
            f"cache {config.prompts!r}. Give --prompts as text."
        )
    if not (run.folder / REAL_IMAGES).exists():
        captioned_images(Path(objective.sample_folder))


def check_sizes(backbone: Backbone, config: DistillConfig) -> None:
    """Raise `WadiError` if the latents of a batch, or of the warm-start pairs, exceed the memory by themselves."""
    height, width = backbone.resolution
    latent_bytes = 4 * math.prod(backbone.latent_shape)
    batch, pairs = config.batch, config.warm_start.pairs
    what = f"A batch of {batch} images of {height} x {width}"
    refuse_larger(2 * batch * latent_bytes, backbone.device, what, "Set a smaller --batch or --resolution.")
    what = f"{pairs:,} pairs of the warm start (warm_start.pairs)"
    refuse_larger(2 * pairs * latent_bytes, torch.device("cpu"), what, "Set a smaller --warm-start.pairs.")
