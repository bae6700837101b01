"""WaDi (arXiv 2603.08258): distil a text-to-image model into one step by training rotation angles only.

One frozen network plays three roles: the teacher (no adapter, the real score), the student (one-step generator) and the fake
model (score of the student's own images). One step of the loop:

    z ~ N(0, I),  x0 = student(z, t*, c)                                    one network evaluation
    x_t = alpha_t x0 + sigma_t eps,  t ~ U[0.02 T, 0.98 T]
    g = w(t) (eps_real(x_t, t, c) - eps_fake(x_t, t, c))                    no gradient; guided, see objectives/vsd.py
    student:  1/2 mean (x0 - stopgrad(x0 - g))^2
    fake:     denoise stopgrad(x0) at a fresh t ~ U[0, T)                   objectives/denoise.py

Only prompts go in; no real image is used. Shapes: latents ``(B, C, H, W)``, timesteps ``(B,)``. Everything but the frozen
network's own arithmetic is float32. Several processes share a step's images (ranks.py); each runs this file on its own rows.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import Backbone, check_not_distilled, from_pipeline, load_pipeline
from wadi.backbones.digest import loaded_digest
from wadi.distill import checkpoints, health, preview
from wadi.distill.batch import Batch, chance, draw, gaussian_like, images_per_step, replace_rows, timesteps, warm_start_pairs
from wadi.distill.checkpoints import TrainState
from wadi.distill.conditions import Conditions, conditions_of, free_encoders, open_source
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.objectives.regression import regression_loss
from wadi.distill.objectives.vsd import vsd_gradient, vsd_loss
from wadi.distill.optimizers import averaged, initial_state, set_learning_rates, update, update_average
from wadi.distill.run_folder import Run, Stop, Stopped, stop_on_signals
from wadi.errors import Interrupted as Interrupted
from wadi.errors import WadiError
from wadi.io.grids import save_png
from wadi.io.progress import console, progress
from wadi.parallel.device import explained_when_full, find_device, keep_freed_memory, refuse_larger
from wadi.parallel.ranks import Ranks, make_accelerator, shard_frozen
from wadi.prompts.cache import Embeddings
from wadi.prompts.order import PromptOrder
from wadi.sampling import check_steps, one_step, predict_guided, student_timestep
from wadi.zoo.paths import absolute_source, resolve_teacher

WHEN_FULL = (
    "What was saved is untouched. Set a lower --batch with a higher --accumulate, or --gradient_checkpointing true: both leave "
    "the result as it is, and the same command with them continues the run. --recompute true needs less too, in a new run."
)
WARN_EVERY = 100  # steps between looks at the run's health, besides every sample grid


def distill(config: DistillConfig) -> Path:
    """Run the distillation of ``config``, or continue it where its folder left it; returns the folder.

    Raises:
        WadiError: on bad input (see each part), or if gradients stay non-finite.
        OutOfMemory: a `WadiError`; what was saved before is untouched.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
    """
    from accelerate.utils import set_seed

    config = replace(config, teacher=absolute_source(config.teacher))
    device = find_device(config.device)
    accelerator = make_accelerator(device, config.tracker, Path(config.out))
    ranks = Ranks()
    run = Run(config, ranks)
    console.quiet = ranks.index > 0
    prompts = open_source(config.prompts, config.prompts_field)
    if ranks.count > 1:
        device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    set_seed(config.seed)  # initial angles; everything later draws from the state's own generator

    # One frozen network, two sets of angles.
    teacher_pipeline = load_pipeline(resolve_teacher(config.teacher), getattr(torch, config.dtype), device)
    backbone = from_pipeline(teacher_pipeline, config.resolution)
    check_not_distilled(teacher_pipeline, backbone.network)
    network, timestep = backbone.network, student_timestep(backbone, config.student.timestep)
    refuse_sizes(backbone, config)
    check_steps(backbone, config.teacher_steps, "teacher_steps")
    if config.warm_start.pairs:
        check_steps(backbone, config.warm_start.sampler_steps, "warm_start.sampler_steps")
    attach_roles(backbone, config)
    state = initial_state(network, config, device)
    state.prompts, state.images = prompts.digest, images_per_step(config, state)
    teacher = checkpoints.fingerprint(network)
    ranks.first(lambda: bool(loaded_digest(teacher_pipeline)))  # the others find it in the cache
    state.pipeline = loaded_digest(teacher_pipeline)
    conditions, null = conditions_of(backbone, prompts), backbone.encode([""])
    order = PromptOrder(len(prompts), config.seed)
    if config.shard:
        shard_frozen(network, [p for role in state.optimizers for p in roles.parameters(network, role).values()])
    if config.compile:
        network.compile()
    ranks.first(lambda: None)  # nobody writes before everybody has looked at the folder

    def save() -> None:
        checkpoints.refuse_not_finite(state)
        with averaged(state):
            extra = {
                "timestep": timestep,
                "resolution": list(backbone.resolution),
                "teacher": config.teacher,
                "fingerprint": teacher,
                "teacher_digest": state.pipeline,
                "step": state.step,
            }
            for role in state.optimizers:
                roles.save(network, role, run.folder / role, extra=extra)
        checkpoints.save(run.checkpoints, state, teacher, config.keep_checkpoints, config.keep_every)

    full = explained_when_full(device, lambda: f"step {state.step} of {config.steps}, batch {config.batch}", WHEN_FULL)
    with run.locked(), full, stop_on_signals(ranks) as stop:
        history, saved = resume(run, state, teacher)
        drawn = run.grid_exists(state.step) or not look_at(state.step, config)
        if (state.step > config.steps or (state.step == config.steps and drawn)) and not stop.agreed():
            return run.folder
        with suppress(Stopped):
            accelerator.init_trackers(run.folder.name)
            pairs = warm_start_pairs(conditions, config, run, order, stop)
            check = Validator(prepare_validation(conditions, config, timestep, stop), backbone, run, state, timestep, stop)
            if isinstance(prompts, Embeddings):
                free_encoders(backbone)
            if not drawn:  # at the start, or a stop came first
                run.amend(history, check())
            with progress("distilling", config.steps, state.step) as bar:
                while state.step < config.steps and not stop.agreed():
                    start = time.perf_counter()
                    batch = draw(conditions, order, null, pairs, config, state)
                    stats = train_step(backbone, batch, timestep, config, state)
                    state.step += 1
                    elapsed = time.perf_counter() - start
                    state.seconds += elapsed
                    stats |= {"step": state.step, "seconds": state.seconds, "skipped": state.skipped}
                    stats |= {"images_per_second": state.images / elapsed, "peak_memory_mib": health.peak_memory(device)}

                    # once in a while: look at the student, save
                    if look := look_at(state.step, config):
                        with suppress(Stopped):
                            stats |= check()
                    for line in health.warnings(stats, history) if look or due(state.step, WARN_EVERY) else ():
                        console.print(f"[yellow]step {state.step}: {line}[/]", soft_wrap=True)
                    ranks.first(partial(run.log, stats))
                    history = [*history[-500:], stats]
                    accelerator.log(stats, step=state.step)
                    if state.step == config.steps or due(state.step, config.checkpoint_every):
                        ranks.first(save)
                        saved = state.step
                    shown = ("loss_fake", "student_angle_rms", "images_per_second")
                    bar.advance({name.replace("_", " "): stats[name] for name in shown if name in stats})
        if stop.agreed() and saved != state.step:
            ranks.first(save)
    accelerator.end_training()
    if stop.signal is not None:
        raise Interrupted(stop.signal, f"Stopped at step {state.step} of {config.steps}, saved. The same command continues.")
    return run.folder


# --- one step ---------------------------------------------------------------------------------------------------------------


def train_step(backbone: Backbone, batch: Batch, timestep: int, config: DistillConfig, state: TrainState) -> dict[str, float]:
    """One update of the student, then ``fake.updates`` of the fake model on the same images. Statistics of both.

    Each process passes its own rows, in ``config.accumulate`` micro-batches; gradients and figures are means over all of them.
    """
    warm, network = config.warm_start, backbone.network
    regressing = state.step < warm.steps
    waiting = warm.steps <= state.step < warm.steps + warm.fake_steps  # for the fake model to know the warmed student
    set_learning_rates(state, config)
    seen: dict[str, Tensor] = {}
    if waiting:
        with torch.no_grad(), roles.active(network, "student"):
            parts = batch.split(config.accumulate)
            x0 = torch.cat([one_step(backbone, part.condition, part.z, timestep) for _, part in parts])
    else:
        x0, seen = student_update(backbone, batch, timestep, regressing, config, state)
    if not regressing:
        for _ in range(config.fake.updates):
            seen |= fake_update(backbone, x0, batch, config, state)
    state.ranks.average(list(seen.values()))
    stats = health.distance_by_timestep(seen.pop("distances")) if "distances" in seen else {}
    stats |= {name: float(value) for name, value in seen.items()}
    return stats | health.angle_stats(network, "student") | health.angle_stats(network, "fake")


def student_update(
    backbone: Backbone, batch: Batch, timestep: int, regressing: bool, config: DistillConfig, state: TrainState
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update by the distillation loss, or in a warm start by regression. The images before it, and figures."""
    made, losses, distances = [], [], []
    if not regressing:
        low, high = (round(fraction * backbone.process.num_timesteps) for fraction in config.t_range)
        t, eps = timesteps(low, high, batch.z, state), gaussian_like(batch.z, state)
    for rows, part in batch.split(config.accumulate):
        # backward() stays inside the context: checkpointed layers are recomputed with the adapter active by then
        with roles.active(backbone.network, "student"):
            x0 = one_step(backbone, part.condition, part.z, timestep)
            if regressing:
                loss = regression_loss(x0, part.target)
            else:
                loss, distance = distillation_loss(backbone, x0, t[rows], eps[rows], part, config, state)
                distances.append(distance)
            state.scalers["student"].scale(loss / config.accumulate).backward()
        made.append(x0.detach())
        losses.append(loss.detach())
    seen = {"loss_student": torch.stack(losses).mean(), "student_grad_norm": update(state, "student", config)}
    update_average(state, config.student.ema)
    return torch.cat(made), seen | ({"distances": torch.stack(distances).sum(0)} if distances else {})


def fake_update(backbone: Backbone, x0: Tensor, batch: Batch, config: DistillConfig, state: TrainState) -> dict[str, Tensor]:
    """One update by the denoising loss on the student's images ``x0``, some of them under the null prompt. Figures."""
    process, losses = backbone.process, []
    t = timesteps(0, process.num_timesteps, x0, state)
    condition = replace_rows(batch.condition, chance(config.fake.null_probability, x0, state), batch.null)
    eps = gaussian_like(x0, state)
    x_t = process.add_noise(x0, eps, t)
    for rows, _ in batch.split(config.accumulate):
        with roles.active(backbone.network, "fake"):
            predicted = backbone.predict(x_t[rows], t[rows], condition[rows])
            seen = (x0[rows], eps[rows], x_t[rows], t[rows])
            loss = denoising_loss(predicted, *seen, process, config.fake.weighting)
            state.scalers["fake"].scale(loss / config.accumulate).backward()
        losses.append(loss.detach())
    return {"loss_fake": torch.stack(losses).mean(), "fake_grad_norm": update(state, "fake", config)}


def distillation_loss(
    backbone: Backbone, x0: Tensor, t: Tensor, eps: Tensor, batch: Batch, config: DistillConfig, state: TrainState
) -> tuple[Tensor, Tensor]:
    """The student's loss on its images ``x0``, with the regression kept beside it if there was a warm start.

    Also returned: `health.distance_sums` of what teacher and fake model see in the images noised by ``eps`` at ``t``.
    """
    process, network = backbone.process, backbone.network
    with torch.no_grad():
        x_t = process.add_noise(x0.detach(), eps, t)
        with roles.active(network, None):
            real = predict_guided(backbone, x_t, t, batch.condition, batch.null, config.guidance_scale)
        with roles.active(network, "fake"):
            fake = predict_guided(backbone, x_t, t, batch.condition, batch.null, config.fake.guidance_scale)
        gradient = vsd_gradient(x0, x_t, t, real, fake, process, config.student.weighting)
        x0_real, x0_fake = process.x0(real, x_t, t), process.x0(fake, x_t, t)
        distances = health.distance_sums(x0_real, x0_fake, t, process.num_timesteps)
    loss = vsd_loss(x0, gradient)
    if count := len(batch.target):
        # a mean over the pairs of the whole step, of which this micro-batch has some
        share = count * config.accumulate * state.ranks.count / batch.paired
        loss = loss + config.warm_start.weight * share * regression_loss(x0[:count], batch.target)
    return loss, distances


# --- what the loop is made of -----------------------------------------------------------------------------------------------


def refuse_sizes(backbone: Backbone, config: DistillConfig) -> None:
    """Raise `WadiError` if noise and images of a batch in latents, or the warm start's pairs, alone exceed the memory."""
    height, width = backbone.resolution
    latent = 4 * math.prod(backbone.latent_shape)
    batch, pairs = config.batch, config.warm_start.pairs
    what = f"A batch of {batch} images of {height} x {width}"
    refuse_larger(2 * batch * latent, backbone.device, what, "Set a smaller --batch or --resolution.")
    what = f"{pairs:,} pairs of the warm start (warm_start.pairs)"
    refuse_larger(2 * pairs * latent, torch.device("cpu"), what, "Set a smaller --warm_start.pairs.")


def attach_roles(backbone: Backbone, config: DistillConfig) -> None:
    """Student and fake adapters on the frozen network, angles zero: all three roles still agree."""
    from wadi.lorad import LoRaDConfig

    roles.refuse_adapted(backbone.network)
    settings_of: dict[str, tuple[StudentConfig | FakeConfig, str]]
    settings_of = {"student": (config.student, backbone.student_targets), "fake": (config.fake, backbone.fake_targets)}
    for role, (settings, default) in settings_of.items():  # before a number of them is allocated
        full = roles.full_rank(backbone.network, settings.target_modules or default)
        if full is not None and settings.rank > full:
            raise WadiError(
                f"{role}.rank is {settings.rank}. Expected at most {full}, the rank that the angles of its largest layer can "
                f"have: set --{role}.rank."
            )
    for role, (settings, default) in settings_of.items():
        targets = settings.target_modules or default
        roles.attach(
            backbone.network,
            role,
            LoRaDConfig(r=settings.rank, target_modules=targets, recompute=config.recompute),
        )
    backbone.network.eval()
    if config.gradient_checkpointing:
        backbone.network.enable_gradient_checkpointing()
        if not backbone.network.is_gradient_checkpointing:
            raise WadiError(f"{type(backbone.network).__name__} does not recompute activations. Expected it: set it to false.")
        backbone.network.train()  # diffusers checkpoints in training mode only ...
        for module in backbone.network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # ... and there dropout would make three different teachers of one


def resume(run: Run, state: TrainState, teacher: str) -> tuple[list[dict[str, float]], int | None]:
    """Put ``state`` where the run's last intact checkpoint left it, and open the folder.

    Nothing in the folder changes before the checkpoint is known to fit, or if the run is longer than its settings now say.

    Returns:
        The statistics up to there, and the step of the checkpoint; None if there is none.
    """
    history: list[dict[str, float]] = []

    def newest() -> int:
        run.forget()
        found, complaints = checkpoints.latest(run.checkpoints)
        for line in complaints:
            console.print(f"[yellow]{line}[/]", soft_wrap=True)
        return 0 if found is None else 1 + checkpoints.step_of(found)

    def open_and_rewind() -> None:
        run.open()
        history.extend(run.rewind(state.step))

    saved = run.ranks.first(newest) - 1
    if saved >= 0:
        checkpoints.load(checkpoints.place(run.checkpoints, saved), state, teacher)
    if state.step > run.config.steps:
        console.print(
            f"{run.folder} already has {state.step} steps; --steps {run.config.steps} changes nothing. To train on, give more "
            "steps.",
            soft_wrap=True,
        )
        return history, saved
    if state.step:
        console.print(f"Continuing {run.folder} from step {state.step} of {run.config.steps}.", soft_wrap=True)
    run.ranks.first(open_and_rewind)
    return history, saved if saved >= 0 else None


def prepare_validation(conditions: Conditions, config: DistillConfig, timestep: int, stop: Stop) -> preview.Validation:
    """The teacher's side of the sample grids.

    Raises:
        Stopped: if a signal asks for a stop meanwhile.
    """
    shown = config.sample_prompts or tuple(conditions.prompts[:8])
    steps, guidance_scale = config.teacher_steps, config.teacher_guidance_scale
    backbone, seeds = conditions.backbone, config.sample_seeds
    return preview.prepare(backbone, shown, seeds, steps, guidance_scale, timestep, between=stop.check)


@dataclass
class Validator:
    """Draws the student's grid of the current step, with the moving average if there is one; the first process writes it.

    Raises:
        Stopped: when called, if a signal asks for a stop meanwhile.
    """

    sampled: preview.Validation
    backbone: Backbone
    run: Run
    state: TrainState
    timestep: int
    stop: Stop

    def __call__(self) -> dict[str, float]:
        with averaged(self.state):
            stats, picture = preview.validate(self.backbone, self.sampled, self.timestep, self.stop.check)
        self.run.ranks.first(lambda: save_png(picture, self.run.grid_file(self.state.step)))
        return stats


def look_at(step: int, config: DistillConfig) -> bool:
    """Whether a grid is drawn at ``step``: at the start, at the end, and every so many steps between."""
    return step in (0, config.steps) or due(step, config.sample_every)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0 = never) is done at ``step``."""
    return every > 0 and step % every == 0
