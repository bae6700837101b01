"""The contract of an objective: what it computes, and what it may use.

An objective is one class in one file of this folder and one line in `OBJECTIVES` (`__init__.py`). It sees tensors and
`Networks`, the frozen network in its three roles. It knows nothing about adapters, optimisers, processes or files.

A step first draws all random numbers of an objective for all of its images (`draw_student`, `draw_fake`), and then computes the
losses in micro-batches (`student_loss`, `fake_loss`). So the size of the micro-batches does not change the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from wadi.backbones import Backbone, Condition
from wadi.diffusion.process import Process
from wadi.distill.config import DistillConfig
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.random_draws import Random
from wadi.errors import WadiError

Draws = dict[str, Tensor]  # tensors with one row per image


class Networks(Protocol):
    """The three roles of the frozen network, as functions of ``x_t`` ``(B, C, H, W)`` and ``t`` ``(B,)``.

    Predictions are float32, of the network's own type: ``process`` converts them. Gradients flow through every role; an
    objective that needs none uses ``torch.no_grad()``.
    """

    @property
    def process(self) -> Process:
        """The noising process."""

    def teacher(self, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """Return the teacher's prediction, guided by ``uncond + w (cond - uncond)``."""

    def fake(self, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """Return the fake model's prediction."""

    def fake_with_features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return the fake model's prediction, and the features of its middle block: ``(B, tokens, width)``."""

    def student(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the image ``x0`` that the student predicts."""


@dataclass(frozen=True)
class Rows:
    """A micro-batch of ``B`` images.

    Attributes:
        x0: the student's images, ``(B, C, H, W)``; with their graph in `Objective.student_loss`, without in
            `Objective.fake_loss`.
        condition: their prompts. In `Objective.fake_loss` some of them are the null prompt.
        samples: images of the teacher, or real ones, ``(B, C, H, W)``; None unless `Objective.needs_samples`.
        sample_condition: their prompts.
        draws: the rows of what the objective drew.
    """

    x0: Tensor
    condition: Condition
    samples: Tensor | None
    sample_condition: Condition | None
    draws: Draws


@dataclass(frozen=True)
class Loss:
    """A loss of a micro-batch.

    Attributes:
        value: scalar, a mean over rows.
        distances: `wadi.distill.health.distance_sums` between the teacher's and the fake model's images, if it knows both.
        statistics: further scalars for the run's statistics, by name.
    """

    value: Tensor
    distances: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeDefaults:
    """Settings of the fake model that an objective uses where the user sets none.

    Attributes:
        guidance_scale: None = that of the teacher.
    """

    guidance_scale: float | None = 1.0
    updates: int = 1
    weighting: Literal["alpha2", "none"] = "none"


@dataclass(frozen=True)
class NoOptions:
    """For objectives without options of their own."""


class Objective(ABC):
    """The losses of student and fake model.

    Class attributes:
        Options: frozen dataclass of the objective's own options (``objective_options``).
        fake_defaults: of the fake model; None if the objective needs no fake model.
        generates: whether `student_loss` uses the student's images ``rows.x0``.

    Args:
        config: settings of the run, with those of the fake model filled in.
        options: an instance of ``Options``.
    """

    Options: ClassVar[type] = NoOptions
    fake_defaults: ClassVar[FakeDefaults | None] = FakeDefaults()
    generates: ClassVar[bool] = True

    def __init__(self, config: DistillConfig, options: Any) -> None:
        self.config, self.options = config, options
        self.modules = nn.ModuleDict()  # trained together with the fake model, and saved with the run

    @property
    def needs_samples(self) -> bool:
        """Whether the losses use ``rows.samples``."""
        return False

    @property
    def needs_features(self) -> bool:
        """Whether the losses use ``networks.fake_with_features``."""
        return False

    @property
    def sample_folder(self) -> str | None:
        """Folder of the images in ``rows.samples``; None = they are the teacher's, from the warm-start pairs."""
        return None

    @property
    def fake_guidance_scale(self) -> float:
        """Guidance scale of the fake model: the setting of the run, or the objective's default."""
        scale = self.config.fake.guidance_scale
        assert scale is not None  # `make_objective` fills in the default
        return scale

    @property
    def module_lr(self) -> float:
        """Learning rate of ``modules``."""
        return self.config.fake.lr

    def build(self, backbone: Backbone) -> None:  # noqa: B027 - most objectives have no modules
        """Create ``modules`` for this backbone. The default creates none."""

    def t_range(self, process: Process) -> tuple[int, int]:
        """Return the range of timesteps ``{low .. high - 1}`` of the student's loss."""
        low, high = (round(fraction * process.num_timesteps) for fraction in self.config.t_range)
        return low, high

    # --- the student --------------------------------------------------------------------------------------------------------

    def draw_student(self, like: Tensor, process: Process, random: Random) -> Draws:
        """Draw the random numbers of `student_loss`: a timestep and noise for each row of ``like`` ``(B, C, H, W)``."""
        return {"t": random.integers(*self.t_range(process), like), "eps": random.gaussian(like)}

    @abstractmethod
    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the student's loss. Only the student is trained by it, whatever its graph contains."""

    # --- the fake model -----------------------------------------------------------------------------------------------------

    def draw_fake(self, like: Tensor, process: Process, random: Random) -> Draws:
        """Draw the random numbers of `fake_loss`. ``null`` marks the rows that get the null prompt."""
        return {
            "t": random.integers(0, process.num_timesteps, like),
            "null": random.chance(self.config.fake.null_probability, like),
            "eps": random.gaussian(like),
        }

    def fake_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the loss of the fake model and of ``modules``. The default denoises the student's images."""
        process, t, eps = networks.process, rows.draws["t"], rows.draws["eps"]
        x_t = process.add_noise(rows.x0, eps, t)
        return Loss(self.denoising(networks.fake(x_t, t, rows.condition), rows, x_t, process))

    def denoising(self, prediction: Tensor, rows: Rows, x_t: Tensor, process: Process) -> Tensor:
        """Return the denoising loss of a prediction at ``x_t``, with the weighting of the run."""
        weighting = self.config.fake.weighting
        assert weighting is not None
        return denoising_loss(prediction, rows.x0, rows.draws["eps"], x_t, rows.draws["t"], process, weighting)


def require(holds: bool, name: str, value: object, condition: str) -> None:
    """Raise `WadiError` unless ``holds``: an option of an objective has a value that it cannot have."""
    if not holds:
        raise WadiError(f"objective_options.{name} is {value!r}. It must be {condition}.")
