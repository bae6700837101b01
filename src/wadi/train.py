"""WaDi (arXiv 2603.08258): distil a text-to-image model into one step by training rotation angles only.

One frozen network plays three roles: the teacher (no adapter, the real score), the student (one-step generator) and the fake
model (score of the student's own images). One step of the loop:

    z ~ N(0, I),  x0 = student(z, t*, c)                                    one network evaluation
    x_t = alpha_t x0 + sigma_t eps,  t ~ U[0.02 T, 0.98 T]
    g = w(t) (eps_real(x_t, t, c) - eps_fake(x_t, t, c))                    no gradient; guided, see objectives/vsd.py
    student:  1/2 mean (x0 - stopgrad(x0 - g))^2
    fake:     denoise stopgrad(x0) at a fresh t ~ U[0, T)                   objectives/denoise.py

Only prompts go in; no real image is used. Shapes: latents ``(B, C, H, W)``, timesteps ``(B,)``. Everything but the frozen
network's own arithmetic is float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi import adapters, checkpoint, health, validation
from wadi.backbones import Backbone, Condition, from_pipeline, load_pipeline, refuse_distilled
from wadi.checkpoint import TrainState
from wadi.config import DistillConfig
from wadi.data.prompts import PromptOrder, read_prompts
from wadi.device import find_device, keep_freed_memory
from wadi.embedded import resolve_prompts, resolve_teacher
from wadi.errors import WadiError
from wadi.objectives.denoise import denoising_loss
from wadi.objectives.regression import regression_loss
from wadi.objectives.vsd import vsd_gradient, vsd_loss
from wadi.optimizers import averaged, initial_state, set_learning_rates, update, update_average
from wadi.progress import console, progress
from wadi.run import Run, Stop, stop_on_signals
from wadi.sampling import one_step, predict_guided
from wadi.warm_start import Pairs, load_pairs, make_pairs, save_pairs

WARN_EVERY = 100  # steps between looks at the run's health, besides every sample grid

MIN_ALPHA = 1e-3  # below it an epsilon-prediction's error is multiplied by more than a thousand


class Interrupted(Exception):
    """A signal asked for a stop; everything is saved. ``signal`` is its number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass
class Batch:
    """One step's conditions and noise; in the first ``len(target)`` rows noise and prompt come from warm-start pairs."""

    condition: Condition
    null: Condition  # one row
    z: Tensor
    target: Tensor  # (pairs in the batch, C, H, W)


def distill(config: DistillConfig) -> Path:
    """Run the distillation of ``config``, or continue it where its folder left it; returns the folder.

    Raises:
        WadiError: on bad input (see each part), or if gradients stay non-finite.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    from accelerate.utils import set_seed

    run = Run(config)
    prompts = read_prompts(resolve_prompts(config.prompts))
    device = find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    accelerator = make_accelerator(config, device, run)
    set_seed(config.seed)  # initial angles; everything later draws from the state's own generator

    # One frozen network, two sets of angles.
    teacher_pipeline = load_pipeline(resolve_teacher(config.teacher), getattr(torch, config.dtype), device)
    backbone = from_pipeline(teacher_pipeline, config.resolution)
    refuse_distilled(teacher_pipeline, backbone.network)
    network, timestep = backbone.network, student_timestep(backbone, config)
    attach_roles(backbone, config)
    state = initial_state(network, config, device)
    teacher = checkpoint.fingerprint(network)
    null = backbone.encode([""])
    order = PromptOrder(len(prompts), config.seed)

    run.open()
    found, complaints = checkpoint.latest(run.checkpoints)
    for line in complaints:
        console.print(f"[yellow]{line}[/]", soft_wrap=True)
    if found is not None:
        checkpoint.load(found, state, teacher)
        console.print(f"Continuing {run.folder} from step {state.step} of {config.steps}.", soft_wrap=True)
    history = run.rewind(state.step)
    if state.step >= config.steps:
        return run.folder
    accelerator.init_trackers(run.folder.name)

    def save() -> None:
        with averaged(state):
            extra = {
                "timestep": timestep,
                "resolution": list(backbone.resolution),
                "teacher": config.teacher,
                "fingerprint": teacher,
                "step": state.step,
            }
            for role in state.optimizers:
                adapters.save(network, role, run.folder / role, extra=extra)
        checkpoint.save(run.checkpoints, state, teacher, config.keep_checkpoints)

    with stop_on_signals() as stop:
        pairs = warm_start_pairs(backbone, prompts, config, run, order, stop)
        sampled = prepare_validation(backbone, prompts, config, timestep)
        check = Validator(backbone, sampled, run, state, timestep)
        if state.step == 0:
            check()
        with progress("distilling", config.steps, state.step) as bar:
            while state.step < config.steps and not stop:
                start = time.perf_counter()
                batch = draw(backbone, prompts, order, null, pairs, config, state)
                stats = train_step(backbone, batch, timestep, config, state)
                state.step += 1
                state.seconds += time.perf_counter() - start
                stats |= {"step": state.step, "seconds": state.seconds, "skipped": state.skipped}
                stats["images_per_second"] = config.batch / (time.perf_counter() - start)

                # once in a while: look at the student, save
                last = state.step == config.steps
                if look := last or due(state.step, config.sample_every):
                    stats |= check()
                for line in health.warnings(stats, history) if look or due(state.step, WARN_EVERY) else ():
                    console.print(f"[yellow]step {state.step}: {line}[/]", soft_wrap=True)
                run.log(stats)
                history = [*history[-500:], stats]
                accelerator.log(stats, step=state.step)
                if last or due(state.step, config.checkpoint_every):
                    save()
                shown = ("loss_fake", "student_angle_rms", "images_per_second")
                bar.advance({name.replace("_", " "): stats[name] for name in shown if name in stats})
    accelerator.end_training()
    if stop.signal is not None and state.step < config.steps:
        save()
        raise Interrupted(stop.signal, f"Stopped at step {state.step} of {config.steps}, saved. The same command continues.")
    return run.folder


# --- one step ---------------------------------------------------------------------------------------------------------------


def train_step(backbone: Backbone, batch: Batch, timestep: int, config: DistillConfig, state: TrainState) -> dict[str, float]:
    """One update of the student, then ``fake.updates`` of the fake model on the same images. Statistics of both."""
    warm = config.warm_start
    regressing = state.step < warm.steps
    waiting = warm.steps <= state.step < warm.steps + warm.fake_steps  # for the fake model to know the warmed student
    set_learning_rates(state, config)
    stats: dict[str, float] = {}
    if waiting:
        with torch.no_grad(), adapters.active(backbone.network, "student"):
            x0 = one_step(backbone, batch.condition, batch.z, timestep)
    else:
        # backward() stays inside the context: checkpointed layers are recomputed with the adapter active by then
        with adapters.active(backbone.network, "student"):
            x0 = one_step(backbone, batch.condition, batch.z, timestep)
            if regressing:
                loss = regression_loss(x0, batch.target)
            else:
                loss, seen = distillation_loss(backbone, x0, batch, config, state)
                stats |= seen
            state.scalers["student"].scale(loss).backward()
        stats |= {"loss_student": loss.item(), "student_grad_norm": update(state, "student", config)}
        update_average(state, config.student.ema)
    if not regressing:
        for _ in range(config.fake.updates):
            with adapters.active(backbone.network, "fake"):
                loss = fake_loss(backbone, x0.detach(), batch, config, state)
                state.scalers["fake"].scale(loss).backward()
            stats |= {"loss_fake": loss.item(), "fake_grad_norm": update(state, "fake", config)}
    return stats | health.angle_stats(backbone.network, "student") | health.angle_stats(backbone.network, "fake")


def distillation_loss(
    backbone: Backbone, x0: Tensor, batch: Batch, config: DistillConfig, state: TrainState
) -> tuple[Tensor, dict[str, float]]:
    """The student's loss on its images ``x0``, with the regression kept beside it if there was a warm start."""
    process, network = backbone.process, backbone.network
    low, high = (round(fraction * process.num_timesteps) for fraction in config.t_range)
    t = torch.randint(low, max(high, low + 1), (len(x0),), generator=state.generator).to(x0.device)
    with torch.no_grad():
        x_t = process.add_noise(x0.detach(), gaussian_like(x0, state), t)
        with adapters.active(network, None):
            real = predict_guided(backbone, x_t, t, batch.condition, batch.null, config.guidance_scale)
        with adapters.active(network, "fake"):
            fake = predict_guided(backbone, x_t, t, batch.condition, batch.null, config.fake.guidance_scale)
        gradient = vsd_gradient(x0, x_t, t, real, fake, process, config.student.weighting)
        x0_real, x0_fake = process.x0(real, x_t, t), process.x0(fake, x_t, t)
        stats = health.distance_by_timestep(x0_real, x0_fake, t, process.num_timesteps)
    loss = vsd_loss(x0, gradient)
    if len(batch.target):
        loss = loss + config.warm_start.weight * regression_loss(x0[: len(batch.target)], batch.target)
    return loss, stats


def fake_loss(backbone: Backbone, x0: Tensor, batch: Batch, config: DistillConfig, state: TrainState) -> Tensor:
    """The denoising loss on the student's images, some of them under the null prompt."""
    process = backbone.process
    t = torch.randint(0, process.num_timesteps, (len(x0),), generator=state.generator).to(x0.device)
    dropped = torch.rand(len(x0), generator=state.generator) < config.fake.null_probability
    eps = gaussian_like(x0, state)
    x_t = process.add_noise(x0, eps, t)
    condition = replace_rows(batch.condition, dropped.to(x0.device), batch.null)
    return denoising_loss(backbone.predict(x_t, t, condition), x0, eps, x_t, t, process, config.fake.weighting)


# --- what the loop is made of -----------------------------------------------------------------------------------------------


def make_accelerator(config: DistillConfig, device: torch.device, run: Run) -> Any:
    """Accelerate's accelerator, with the tracker that the config names.

    Raises:
        WadiError: if accelerate does not know the tracker, or it is not installed.
    """
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(cpu=device.type == "cpu", log_with=config.tracker, project_dir=run.folder)
    except ValueError as error:
        raise WadiError(f"tracker is {config.tracker!r}. Expected one that accelerate knows: {error}") from error
    if config.tracker and not accelerator.log_with:
        raise WadiError(f"tracker is {config.tracker!r}, which is not installed. Expected it, or null: install {config.tracker}.")
    return accelerator


def student_timestep(backbone: Backbone, config: DistillConfig) -> int:
    """``t*``, the timestep at which the student is asked."""
    last = backbone.process.last_timestep
    timestep = config.student.timestep if config.student.timestep is not None else last
    if timestep > last:
        raise WadiError(f"student.timestep is {timestep}. Expected at most {last}, the last of the teacher's schedule.")
    alpha = float(backbone.process.alpha(torch.tensor([timestep])))
    if backbone.process.prediction == "epsilon" and alpha < MIN_ALPHA:
        raise WadiError(
            f"At timestep {timestep} the teacher's schedule has alpha = {alpha:.1e} (zero terminal SNR), and the network "
            "predicts noise, from which no image can be told there. Expected an earlier student.timestep: try 800."
        )
    return timestep


def attach_roles(backbone: Backbone, config: DistillConfig) -> None:
    """Student and fake adapters on the frozen network, angles zero: all three roles still agree."""
    from wadi.lorad import LoRaDConfig

    adapters.refuse_adapted(backbone.network)
    for role, settings, default in (
        ("student", config.student, backbone.student_targets),
        ("fake", config.fake, backbone.fake_targets),
    ):
        targets = settings.target_modules or default
        adapters.attach(
            backbone.network,
            role,
            LoRaDConfig(r=settings.rank, target_modules=targets, recompute=config.recompute),
        )
    backbone.network.eval()
    if config.gradient_checkpointing:
        backbone.network.enable_gradient_checkpointing()  # type: ignore[operator]
        backbone.network.train()  # diffusers checkpoints in training mode only ...
        for module in backbone.network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # ... and there dropout would make three different teachers of one


def draw(
    backbone: Backbone, prompts: list[str], order: PromptOrder, null: Condition, pairs: Pairs | None, config: DistillConfig,
    state: TrainState,
) -> Batch:  # fmt: skip
    """The next prompts and their noise; while pairs matter, the first rows are pairs: all in the warm start, half later."""
    warm = config.warm_start
    count = 0
    if pairs is not None:
        count = config.batch if state.step < warm.steps else config.batch // 2 if warm.weight > 0 else 0
    rows = order.rows(state.drawn, config.batch - count)
    state.drawn += config.batch - count
    z = torch.randn((len(rows), *backbone.latent_shape), generator=state.generator).to(_device(backbone))
    target = z[:0]
    if pairs is not None and count:
        chosen = torch.randint(0, len(pairs.rows), (count,), generator=state.generator)
        rows = torch.cat([pairs.rows[chosen], rows])
        z, target = torch.cat([pairs.z[chosen.to(z.device)], z]), pairs.x0[chosen.to(z.device)]
    return Batch(backbone.encode([prompts[i] for i in rows]), null, z, target)


def warm_start_pairs(
    backbone: Backbone, prompts: list[str], config: DistillConfig, run: Run, order: PromptOrder, stop: Stop
) -> Pairs | None:
    """The run's pairs, made once and kept in its folder."""
    if config.warm_start.pairs == 0:
        return None
    path = run.folder / "warm_start.safetensors"
    if not path.exists():
        rows = order.rows(0, config.warm_start.pairs)
        pairs = make_pairs(backbone, prompts, rows, config.warm_start, config.seed * 1_000_003, stop)
        if pairs is None:
            return None
        save_pairs(pairs, path)
    return load_pairs(path, _device(backbone))


def prepare_validation(backbone: Backbone, prompts: list[str], config: DistillConfig, timestep: int) -> validation.Validation:
    """The teacher's side of the sample grids."""
    shown = config.sample_prompts or tuple(prompts[:8])
    steps, guidance_scale = config.teacher_steps, config.teacher_guidance_scale
    return validation.prepare(backbone, shown, config.sample_seeds, steps, guidance_scale, timestep)


@dataclass
class Validator:
    """Draws the student's grid of the current step, with the moving average if there is one."""

    backbone: Backbone
    sampled: validation.Validation
    run: Run
    state: TrainState
    timestep: int

    def __call__(self) -> dict[str, float]:
        picture = self.run.samples / f"step-{self.state.step:07d}.png"
        with averaged(self.state):
            return validation.validate(self.backbone, self.sampled, self.timestep, picture)


def gaussian_like(x: Tensor, state: TrainState) -> Tensor:
    """``N(0, I)`` of the shape of ``x``, from the state's generator: the same on any device."""
    return torch.randn(x.shape, generator=state.generator).to(x.device)


def replace_rows(condition: Condition, rows: Tensor, null: Condition) -> Condition:
    """``condition`` with the null prompt in the rows where the mask ``rows`` ``(B,)`` is true."""

    def mixed(name: str, value: Tensor) -> Tensor:
        mask = rows.reshape(-1, *([1] * (value.ndim - 1)))
        return torch.where(mask, null.tensors[name].expand_as(value), value)

    return Condition({name: mixed(name, value) for name, value in condition.tensors.items()})


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0 = never) is done at ``step``."""
    return every > 0 and step % every == 0


def _device(backbone: Backbone) -> Any:
    return next(backbone.network.parameters()).device
