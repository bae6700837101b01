"""The loop that trains a ControlNet, with its checkpoint.

Batches and noise are functions of seed and step, so a checkpoint needs no state of a random generator.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.backbones import Backbone, Condition
from wadi.distill.schedules import cosine, rise
from wadi.errors import WadiError, first_line
from wadi.extras.control.config import ControlConfig
from wadi.extras.control.data import TrainingImages
from wadi.extras.control.losses import edge_loss, noisy_timesteps, residual_change, student_x0, teacher_loss
from wadi.io.files import write_whole
from wadi.io.moments import moments_of, restore_moments
from wadi.io.progress import progress
from wadi.io.tensors import read_with_metadata
from wadi.parallel.signals import stop_on_signals

WARMUP = 30  # steps


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the learning rate at ``step``: it rises for 30 steps, then falls to 0 as a cosine."""
    return rise(step + 1, WARMUP) * cosine(step, steps)


class ControlTraining:
    """The ControlNet, its optimiser and its data at a step.

    Args:
        timestep: the student's ``t*``; None = train for a teacher.
        controlnet: trained in place.
    """

    def __init__(
        self, config: ControlConfig, backbone: Backbone, timestep: int | None, controlnet: Any, images: TrainingImages
    ) -> None:
        self.config, self.backbone, self.timestep, self.images = config, backbone, timestep, images
        self.initial = copy.deepcopy(controlnet).requires_grad_(False).eval() if config.keep_weight else None
        self.controlnet = controlnet.float().requires_grad_(True).train()
        backbone.network.requires_grad_(False).eval()
        backbone.pipeline.vae.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(controlnet.parameters(), lr=config.lr, weight_decay=1e-2)
        with torch.no_grad():
            parts = [backbone.encode(images.prompts[i : i + 64]) for i in range(0, len(images.prompts), 64)]
        self.encoded, self.null = Condition.cat(parts), backbone.encode([""])
        self.step, self.path, self.note = 0, Path(), ""

    def loss(self, step: int) -> Tensor:
        """Return the loss of the batch that belongs to ``step``."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        rows = torch.randint(len(self.images.latents), (self.config.batch,), generator=generator)
        device = self.backbone.device
        x0 = self.images.latents[rows].float()
        noise = torch.randn(x0.shape, generator=generator).to(device)
        x0, image = x0.to(device), self.images.conditions(rows).to(device)
        if self.timestep is not None:
            return self._student_loss(x0, image, self.encoded[rows], noise, self.timestep)
        dropped = torch.rand(len(rows), generator=generator) < self.config.drop
        t = noisy_timesteps(len(rows), self.backbone.process.num_timesteps, generator).to(device)
        return teacher_loss(self.backbone, self.controlnet, x0, image, self._with_null(rows, dropped), noise, t)

    def _with_null(self, rows: Tensor, dropped: Tensor) -> Condition:
        """Return the conditions of ``rows``, with the null condition where ``dropped``."""
        both = Condition.cat([self.encoded[rows], self.null])
        index = torch.where(dropped, torch.tensor(len(rows)), torch.arange(len(rows)))
        return both[index]

    def _student_loss(self, x0: Tensor, image: Tensor, condition: Condition, noise: Tensor, timestep: int) -> Tensor:
        config, t = self.config, torch.full((len(x0),), timestep, device=x0.device)
        x_t = self.backbone.process.add_noise(x0, noise, t)
        x0_hat = student_x0(self.backbone, self.controlnet, x_t, image, condition, timestep)
        loss = config.picture_weight * (x0_hat - x0).square().mean()
        if config.edge_weight:
            loss = loss + config.edge_weight * edge_loss(self.backbone, x0_hat, x0)
        if self.initial is not None:
            loss = loss + config.keep_weight * residual_change(self.controlnet, self.initial, x_t, t, image, condition)
        return loss

    def loop(self) -> None:
        """Train to the last step, and save every `ControlConfig.save_every` steps.

        Raises:
            WadiError: if a gradient is not finite.
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
        """
        config, average = self.config, 0.0
        with stop_on_signals() as stop, progress("training the ControlNet", config.steps, self.step) as bar:
            while self.step < config.steps:
                loss = self._update()
                average = loss if average == 0 else 0.95 * average + 0.05 * loss
                self.step += 1
                bar.advance({"loss": average})
                if stop.synchronise() or self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
                if stop.signal is not None:
                    raise stop.interrupted(f"Stopped at step {self.step} of {config.steps}, saved. The same command continues.")
        self.controlnet.eval()

    def _update(self) -> float:
        """Take one optimiser step and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * learning_rate_share(self.step, self.config.steps)
        loss = self.loss(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.controlnet.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise WadiError(
                f"The gradient of step {self.step} is not finite. Use a lower --lr than {self.config.lr:g}. The last "
                "checkpoint is untouched."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def save(self) -> None:
        """Write the ControlNet and AdamW's moments to one file."""
        from safetensors.torch import save

        tensors = {f"net.{name}": value for name, value in self.controlnet.state_dict().items()}
        tensors |= moments_of(self.optimizer, "adam.")
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(self.path, save(plain, {"step": str(self.step), "note": self.note}))

    def resume(self, path: Path, note: str) -> None:
        """Continue from the checkpoint at ``path``, if there is one, bit for bit.

        Args:
            path: also the place of later checkpoints.
            note: the settings of this training, stored with each checkpoint (`training.check_same_training` compares them).
        Raises:
            WadiError: if the checkpoint is damaged.
        """
        self.path, self.note = path, note
        if not path.is_file():
            return
        tensors, metadata = read_with_metadata(path, "The checkpoint", "Delete it to start the training again.")
        weights = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
        try:
            self.step = int(metadata["step"])
            self.controlnet.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise WadiError(
                f"{str(path)!r} is damaged ({first_line(error)}). Delete it to start the training again."
            ) from error
        restore_moments(self.optimizer, tensors, "adam.")
