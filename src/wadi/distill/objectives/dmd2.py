"""DMD2 (arXiv 2405.14867): DMD with several updates of the fake model per step, and an optional GAN.

    student:     DMD's loss + gan_weight * softplus(-D(h_fake(x_t)))
    fake model:  denoising loss + gan_fake_weight * (softplus(-D(h_fake(y_t))) + softplus(D(h_fake(x_t))))

``h_fake`` are the features of the fake model's middle block, and ``D`` is a small head on each of its tokens. ``y`` are the
teacher's own samples (``warm_start.pairs``), so training still needs prompts only; a folder of images can replace them. With
``gan_weight`` 0 there is no head, and no sample is needed. Students of several steps are trained on their own earlier images,
which is DMD2's backward simulation; `wadi.distill.step` does this for every objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from wadi.backbones import Backbone
from wadi.diffusion.process import Process
from wadi.distill import health
from wadi.distill.objectives.base import Draws, FakeDefaults, Loss, Networks, Rows, require
from wadi.distill.objectives.dmd import DMD
from wadi.distill.objectives.score import dmd_gradient, gradient_loss
from wadi.distill.random_draws import Random


@dataclass(frozen=True)
class DMD2Options:
    """Options of DMD2.

    Attributes:
        gan_weight: weight of the GAN loss of the student; 0 = no GAN.
        gan_fake_weight: weight of the GAN loss of the fake model and the head.
        gan_lr: learning rate of the head; null = that of the fake model.
        real_images: folder of images that the head learns to tell from the student's; the prompt of ``cat.png`` is in
            ``cat.txt``; null = the teacher's own samples.
    """

    gan_weight: float = 0.0
    gan_fake_weight: float = 0.01
    gan_lr: float | None = None
    real_images: str | None = None

    def __post_init__(self) -> None:
        for name in ("gan_weight", "gan_fake_weight"):
            value = getattr(self, name)
            require(0 <= value <= 1e6, name, value, "from 0 to 1,000,000")
        require(self.gan_lr is None or 0 < self.gan_lr <= 1e6, "gan_lr", self.gan_lr, "above 0")
        require(self.real_images != "", "real_images", self.real_images, "a folder, or null")
        unused = self.real_images is not None and self.gan_weight == 0
        require(not unused, "real_images", self.real_images, "null where gan_weight is 0: only the GAN uses images")


class Head(nn.Module):
    """Tell features of images apart: ``(B, tokens, width)`` -> one logit per image ``(B,)``, the mean over its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits; above 0 means real."""
        logits: Tensor = self.out(nn.functional.silu(self.hidden(self.norm(features.float()))))
        return logits.mean((1, 2))


class DMD2(DMD):
    """DMD with five updates of the fake model, and a GAN on its features if ``gan_weight`` is above 0."""

    Options = DMD2Options
    fake_defaults = FakeDefaults(guidance_scale=1.0, updates=5, weighting="none")
    options: DMD2Options

    @property
    def needs_samples(self) -> bool:
        """Whether there is a GAN."""
        return self.options.gan_weight > 0

    @property
    def needs_features(self) -> bool:
        """Whether there is a GAN."""
        return self.needs_samples

    @property
    def sample_folder(self) -> str | None:
        """The folder of real images, if the user gives one."""
        return self.options.real_images

    @property
    def module_lr(self) -> float:
        """Learning rate of the head."""
        return self.config.fake.lr if self.options.gan_lr is None else self.options.gan_lr

    def build(self, backbone: Backbone) -> None:
        """Create the head, if there is a GAN."""
        if self.needs_samples:
            self.modules["head"] = Head(backbone.feature_width)

    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return DMD's loss, plus that of fooling the head."""
        if not self.needs_samples:
            return super().student_loss(networks, rows)
        process, t = networks.process, rows.draws["t"]
        x_t = process.add_noise(rows.x0, rows.draws["eps"], t)
        with torch.no_grad():
            real = networks.teacher(x_t, t, rows.condition, self.config.guidance_scale)
        fake, features = networks.fake_with_features(x_t, t, rows.condition)
        if self.fake_guidance_scale != 1:
            with torch.no_grad():
                fake = networks.fake(x_t, t, rows.condition, self.fake_guidance_scale)
        with torch.no_grad():
            distances = health.distance_sums(process.x0(real, x_t, t), process.x0(fake, x_t, t), t, process.num_timesteps)
        matching = gradient_loss(rows.x0, dmd_gradient(rows.x0, x_t, t, real, fake, process))
        adversarial = softplus(-self.modules["head"](features)).mean()
        loss = matching + self.options.gan_weight * adversarial
        return Loss(loss, distances, {"loss_gan_student": adversarial.detach()})

    def draw_fake(self, like: Tensor, process: Process, random: Random) -> Draws:
        """Draw also the noise of the samples."""
        draws = super().draw_fake(like, process, random)
        return draws | {"eps_samples": random.gaussian(like)} if self.needs_samples else draws

    def fake_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the denoising loss, plus that of telling the student's images from the samples."""
        if not self.needs_samples:
            return super().fake_loss(networks, rows)
        process, t = networks.process, rows.draws["t"]
        x_t = process.add_noise(rows.x0, rows.draws["eps"], t)
        prediction, features = networks.fake_with_features(x_t, t, rows.condition)
        assert rows.samples is not None
        assert rows.sample_condition is not None
        y_t = process.add_noise(rows.samples, rows.draws["eps_samples"], t)
        _, sample_features = networks.fake_with_features(y_t, t, rows.sample_condition)
        head = self.modules["head"]
        on_student, on_samples = head(features), head(sample_features)
        adversarial = softplus(on_student).mean() + softplus(-on_samples).mean()
        loss = self.denoising(prediction, rows, x_t, process) + self.options.gan_fake_weight * adversarial
        accuracy = ((on_student < 0).float().mean() + (on_samples > 0).float().mean()) / 2
        return Loss(loss, statistics={"loss_gan_head": adversarial.detach(), "gan_head_accuracy": accuracy})
