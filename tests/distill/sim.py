"""The objective of docs/add-an-objective.md."""

from dataclasses import dataclass

from wadi.distill import health
from wadi.distill.objectives import OBJECTIVES
from wadi.distill.objectives.base import FakeDefaults, Loss, Networks, Objective, Rows, require


@dataclass(frozen=True)
class SIMOptions:
    """Options of SIM.

    Attributes:
        huber: ``c`` of the pseudo-Huber distance, for latents of unit variance.
    """

    huber: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.huber <= 1e3, "huber", self.huber, "above 0 and at most 1000")


class SIM(Objective):
    """Score Implicit Matching (arXiv 2410.16794) with the pseudo-Huber distance."""

    Options = SIMOptions
    fake_defaults = FakeDefaults(guidance_scale=1.0, updates=2, weighting="none")
    options: SIMOptions

    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        process, t, condition = networks.process, rows.draws["t"], rows.condition
        x_t = process.add_noise(rows.x0, rows.draws["eps"], t)
        real = process.x0(networks.teacher(x_t, t, condition, self.config.guidance_scale), x_t, t)
        fake = process.x0(networks.fake(x_t, t, condition, self.fake_guidance_scale), x_t, t)
        distance = (fake - real).flatten(1)
        length = (distance.square().mean(1, keepdim=True) + self.options.huber**2).sqrt()
        loss = (distance / length * (rows.x0 - fake).flatten(1)).mean()
        apart = health.distance_sums(real.detach(), fake.detach(), t, process.num_timesteps)
        return Loss(loss, apart, {"sim_length": length.detach().mean()})


OBJECTIVES["sim"] = f"{__name__}:SIM"
