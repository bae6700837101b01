"""A run: prepare, resume, repeat `wadi.distill.step.train_step`, and save.

The files that a run writes are in `run_folder.py` and `checkpoints.py`. On several processes all run this file; whatever
communicates is called by all of them at the same place.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from wadi import roles
from wadi.distill import checkpoint_folders, checkpoints, health, preview
from wadi.distill.batch import draw_batch
from wadi.distill.conditions import free_encoders
from wadi.distill.config import DistillConfig
from wadi.distill.optimizers import averaged
from wadi.distill.samples import Samples, samples_of_folder, samples_of_pairs
from wadi.distill.setup import Training, prepare
from wadi.distill.step import as_numbers, train_step
from wadi.distill.warm_start import Pairs, pairs_of_run
from wadi.io.grids import save_png
from wadi.io.progress import console, progress
from wadi.parallel.device import explained_when_full
from wadi.parallel.signals import Stop, Stopped, stop_on_signals
from wadi.prompts.cache import Embeddings

WHEN_FULL = (
    "Saved files are untouched. Set a lower --batch with a higher --accumulate, --gradient-checkpointing true, or --recompute "
    "true: they leave the result as it is, and the same command with them continues the run."
)
WARN_EVERY = 100  # steps between checks of the run's health, besides those at every preview
SHOWN = ("loss_fake", "student_angle_rms", "images_per_second")  # next to the progress bar
HISTORY = 500  # lines of statistics that health checks look back on


def distill(config: DistillConfig) -> Path:
    """Run the distillation of ``config``, or continue it where its folder left it. Return the folder.

    Raises:
        WadiError: on bad input, or if gradients stay non-finite.
        OutOfMemory: a `WadiError`; saved files are untouched.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
    """
    training = prepare(config)
    run, state, ranks = training.run, training.state, training.ranks
    full = explained_when_full(training.device, lambda: f"step {state.step} of {config.steps}, batch {config.batch}", WHEN_FULL)
    ranks.wait_for_all()  # no process writes before all have checked the folder
    with run.locked(), full, stop_on_signals(ranks) as stop:
        history, saved_step = resume(training)
        previewed = run.grid_exists(state.step) or not preview_due(state.step, config)
        finished = state.step > config.steps or (state.step == config.steps and previewed)
        if finished and not stop.synchronise():
            return run.folder
        loop = Loop(training, stop, history, saved_step)
        with suppress(Stopped):
            loop.run(previewed)
        if stop.synchronise() and loop.saved_step != state.step:
            loop.save()
    training.accelerator.end_training()
    if stop.signal is not None:
        raise stop.interrupted(f"Stopped at step {state.step} of {config.steps}, saved. The same command continues.")
    return run.folder


@dataclass
class Loop:
    """The loop over steps, with its reports and its saving.

    Attributes:
        history: the last lines of statistics, oldest first.
        saved_step: step of the newest checkpoint; None if there is none.
    """

    training: Training
    stop: Stop
    history: list[dict[str, float]]
    saved_step: int | None
    preview: Preview = field(init=False)

    def run(self, previewed: bool) -> None:
        """Train until ``config.steps``, or until a signal requests a stop. Communicates.

        Args:
            previewed: whether the image grid of the present step exists.
        Raises:
            Stopped: if a stop is requested before the first step.
        """
        training, state, config = self.training, self.training.state, self.training.config
        warm = config.warm_start
        if warm.steps + warm.fake_steps >= config.steps:
            console.print(
                f"[yellow]All {config.steps} steps belong to the warm start ({warm.steps} of regression, {warm.fake_steps} of "
                "the fake model alone): nothing is distilled. Set more --steps to distil.[/]",
                soft_wrap=True,
            )
        training.accelerator.init_trackers(training.run.folder.name)
        pairs = pairs_of_run(training.conditions, config, training.run, training.order, self.stop)
        samples = self.samples(pairs)
        self.preview = Preview(training, self.stop)
        if isinstance(training.conditions.prompts, Embeddings):
            free_encoders(training.backbone)
        if not previewed:
            training.run.amend(self.history, self.preview.save_grid())
        with progress("distilling", config.steps, state.step) as bar:
            while state.step < config.steps and not self.stop.synchronise():
                stats = self.step(pairs, samples)
                bar.advance({name.replace("_", " "): stats[name] for name in SHOWN if name in stats})

    def samples(self, pairs: Pairs | None) -> Samples | None:
        """Return the images that the objective needs; None if it needs none. Communicates."""
        objective, conditions = self.training.objective, self.training.conditions
        if not objective.needs_samples:
            return None
        if objective.sample_folder is not None:
            return samples_of_folder(Path(objective.sample_folder), conditions, self.training.run)
        assert pairs is not None  # `check_samples`
        return samples_of_pairs(pairs, conditions)

    def step(self, pairs: Pairs | None, samples: Samples | None = None) -> dict[str, float]:
        """Train one step. Report and save if that is due. Return its statistics. Communicates."""
        training, state, config = self.training, self.training.state, self.training.config
        start = time.perf_counter()
        batch = draw_batch(training.conditions, training.order, training.null, pairs, config, state, samples)
        measured = train_step(training.backbone, batch, training.timesteps, training.objective, config, state)
        stats = as_numbers(measured, state.network)
        state.step += 1
        elapsed = time.perf_counter() - start
        state.seconds += elapsed
        stats |= {"step": state.step, "seconds": state.seconds, "skipped": state.skipped}
        stats |= {
            "images_per_second": state.images_per_step / elapsed,
            "peak_memory_mib": health.peak_memory(training.device),
        }
        at_preview = preview_due(state.step, config)
        if at_preview:
            with suppress(Stopped):
                stats |= self.preview.save_grid()
        if at_preview or due(state.step, WARN_EVERY):
            for role in roles.attached(state.network):
                stats |= health.weight_change_stats(state.network, role)
            for line in health.warnings(stats, self.history):
                console.print(f"[yellow]step {state.step}: {line}[/]", soft_wrap=True)
        training.ranks.on_first(partial(training.run.log, stats))
        self.history = [*self.history[-HISTORY:], stats]
        training.accelerator.log(stats, step=state.step)
        if state.step == config.steps or due(state.step, config.checkpoint_every):
            self.save()
        return stats

    def save(self) -> None:
        """Write both adapters and a checkpoint. Communicates."""
        self.training.ranks.on_first(partial(save, self.training))
        self.saved_step = self.training.state.step


def save(training: Training) -> None:
    """Write both adapters, with the moving average if there is one, and a checkpoint.

    Raises:
        WadiError: if a value is not finite, or the disk is full. Saved files are untouched.
    """
    run, state, config = training.run, training.state, training.config
    checkpoints.refuse_not_finite(state)
    about = {
        "timesteps": list(training.timesteps),
        "resolution": list(training.backbone.resolution),
        "teacher": config.teacher,
        "fingerprint": training.fingerprint,
        "teacher_digest": state.teacher_digest,
        "step": state.step,
    }
    with averaged(state):
        for role in roles.attached(state.network):
            roles.save(state.network, role, run.folder / role, extra=about)
    checkpoints.save(run.checkpoints, state, training.fingerprint, config.keep_checkpoints, config.keep_every)


def resume(training: Training) -> tuple[list[dict[str, float]], int | None]:
    """Restore the run's newest intact checkpoint, and open its folder. Communicates.

    Nothing in the folder changes before the checkpoint is known to fit, or if it has more steps than the config.

    Returns:
        The statistics up to there (on the first process), and the step of the checkpoint; None if there is none.
    """
    run, state, ranks = training.run, training.state, training.ranks
    history: list[dict[str, float]] = []

    def newest_plus_one() -> int:
        run.forget()
        newest, complaints = checkpoint_folders.latest(run.checkpoints)
        for line in complaints:
            console.print(f"[yellow]{line}[/]", soft_wrap=True)
        return 0 if newest is None else 1 + checkpoint_folders.step_of(newest)

    def open_and_rewind() -> None:
        run.open()
        history.extend(run.rewind(state.step))

    saved_step = ranks.on_first(newest_plus_one) - 1
    if saved_step >= 0:
        checkpoints.load(checkpoint_folders.place(run.checkpoints, saved_step), state, training.fingerprint)
    if state.step > run.config.steps:
        console.print(
            f"{run.folder} already has {state.step} steps, so --steps {run.config.steps} changes nothing. Set more steps to "
            "train on.",
            soft_wrap=True,
        )
        return history, saved_step
    if state.step:
        console.print(f"Continuing {run.folder} from step {state.step} of {run.config.steps}.", soft_wrap=True)
    ranks.on_first(open_and_rewind)
    return history, saved_step if saved_step >= 0 else None


class Preview:
    """Image grids of fixed prompts and seeds: the teacher's images, made once, and the student's at the present step.

    Raises:
        Stopped: if a signal requests a stop while images are generated.
    """

    def __init__(self, training: Training, stop: Stop) -> None:
        config = training.config
        self.training, self.stop = training, stop
        self.reference = preview.generate_teacher_images(
            training.backbone,
            config.sample_prompts or tuple(training.conditions.prompts[:8]),
            config.sample_seeds,
            config.teacher_steps,
            config.teacher_guidance_scale,
            training.timesteps,
            between=stop.raise_if_requested,
        )

    def save_grid(self) -> dict[str, float]:
        """Generate the student's images, with the moving average if there is one, and write the grid. Return statistics."""
        training, run = self.training, self.training.run
        with averaged(training.state):
            stats, grid = preview.validate_student(
                training.backbone, self.reference, training.timesteps, self.stop.raise_if_requested
            )
        run.ranks.on_first(lambda: save_png(grid, run.grid_file(training.state.step)))
        return stats


def preview_due(step: int, config: DistillConfig) -> bool:
    """Return whether an image grid is made at ``step``: at the start, at the end, and every ``sample_every`` steps."""
    return step in (0, config.steps) or due(step, config.sample_every)


def due(step: int, every: int) -> bool:
    """Return whether something done every ``every`` steps (0 = never) is due at ``step``."""
    return every > 0 and step % every == 0
