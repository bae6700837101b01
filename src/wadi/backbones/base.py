"""What every model family offers to the rest of the package, and nothing more.

A backbone is built from a loaded diffusers pipeline. It knows its model's inputs, latents and layers; it knows nothing of
adapters, objectives or accelerate.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from wadi.backbones.remarks import quieten_truncation
from wadi.diffusion import autoencoder, schedulers
from wadi.diffusion.process import Process
from wadi.errors import WadiError

RESOLUTION = "_wadi_resolution"  # in the config of a pipeline: where a student of another size than the model's own keeps it


@dataclass(frozen=True)
class Condition:
    """What the network is told besides ``x_t`` and ``t``: named tensors, each with the batch in front."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Condition:
        """Rows by slice, index tensor or list; always keeps the batch dimension."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """One row (the null prompt, say) repeated ``batch`` times, without a copy."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Every tensor moved, as by ``Tensor.to``."""
        return Condition({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several batches as one."""
        names = conditions[0].tensors
        return Condition({k: torch.cat([c.tensors[k] for c in conditions]) for k in names})


class Outline(SimpleNamespace):
    """As much of a pipeline as a backbone needs in order to predict, in place of one: no encoder, no decoder.

    Attributes: ``pipeline_class`` (its name), ``scheduler``, ``vae_scale_factor``, ``config`` (a dictionary), and the network
    under the family's `Backbone.component`.
    """

    pipeline_class: str


class Backbone(ABC):
    """A text-to-image network with its own encoder, decoder and noising process.

    A family overrides `encode` and `predict`, sets the class attributes, and changes of the rest what is different in it.

    Class attributes:
        component: name of the network in the pipeline, ``"transformer"`` or ``"unet"``.
        student_targets, fake_targets: regular expressions, full match over module names, of the layers that adapters of the
            student and of the fake model go on by default.
        no_guidance: ``guidance_scale`` of the pipeline's call for one conditional pass. A network that takes a guidance scale
            as an input receives this one in every pass, also in training.
        default_guidance: scale of a teacher's many steps if the user gives none; None = the command's own default.

    Attributes:
        pipeline: the diffusers pipeline it was built from.
        network: the denoiser whose weights the adapters rotate.
        process: ``alpha_t``, ``sigma_t`` and the prediction type, from the pipeline's own scheduler.
        resolution: ``(height, width)`` of an image in pixels; unless given, the size that a student's pipeline was made for,
            or the model's own.
        latent_shape: ``(C, H, W)`` of one latent.
    """

    component: ClassVar[str] = "transformer"
    student_targets: str  # a family may set these for each network
    fake_targets: str
    no_guidance: ClassVar[float] = 0.0
    default_guidance: ClassVar[float | None] = None

    def __init__(self, pipeline: Any, resolution: tuple[int, int] | None = None) -> None:
        quieten_truncation()
        self.pipeline = pipeline
        self.network: Any = getattr(pipeline, self.component)  # an nn.Module with a config
        self.process = Process.from_scheduler(pipeline.scheduler)
        self.student_targets, self.fake_targets = self.default_targets(self.network.config)
        remembered = pipeline.config.get(RESOLUTION)
        native = tuple(remembered) if remembered else self.native_resolution(self.network.config, self.scale)
        self.resolution = self.checked(resolution or native)
        height, width = self.resolution
        self.latent_shape = (self.latent_channels(self.network.config), height // self.scale, width // self.scale)

    @classmethod
    def default_targets(cls, config: Any) -> tuple[str, str]:
        """`student_targets` and `fake_targets` for a network of this ``config``."""
        return cls.student_targets, cls.fake_targets

    # --- shapes -------------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> int:
        """Pixels per latent, each way."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def patch(self) -> int:
        """Latents per token of the network, each way: height and width in latents are multiples of it."""
        return int(self.network.config.get("patch_size") or 1)

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """``(height, width)`` in pixels that a network of this ``config`` was made for."""
        size = config.get("sample_size")
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= 65_536 for side in sides):
            raise WadiError(
                f"The network's config has {size!r} under 'sample_size'. It must be one or two whole numbers from 1 to 65,536."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale

    @staticmethod
    def latent_channels(config: Any) -> int:
        """Channels of a latent."""
        return int(config.in_channels)

    def checked(self, resolution: tuple[int, int]) -> tuple[int, int]:
        """``resolution``, if the model can draw it.

        Raises:
            WadiError: if a side is not a multiple of what the autoencoder and the network need.
        """
        multiple = self.scale * self.patch
        if any(side < multiple or side % multiple for side in resolution):
            near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in resolution)
            raise WadiError(
                f"resolution is {resolution[0]} x {resolution[1]}. Expected multiples of {multiple}, which "
                f"{type(self.network).__name__} needs ({self.scale} pixels per latent, {self.patch} per patch): try {near}."
            )
        return resolution

    def remember_resolution(self) -> None:
        """Note `resolution` in the pipeline, if it is not the model's own, so that it is saved with it."""
        if self.resolution != self.native_resolution(self.network.config, self.scale):
            self.pipeline.register_to_config(**{RESOLUTION: list(self.resolution)})

    # --- the contract -------------------------------------------------------------------------------------------------------

    def encode_defaults(self) -> dict[str, Any]:
        """Return arguments for the pipeline's ``encode_prompt``: defaults of its call where the two have different ones.

        With them long prompts are cut, and captions cleaned, in training as in a plain call.
        """
        encoding = inspect.signature(self.pipeline.encode_prompt).parameters
        calling = inspect.signature(type(self.pipeline).__call__).parameters
        pairs = {name: (calling[name].default, encoding[name].default) for name in encoding if name in calling}
        empty = inspect.Parameter.empty
        return {name: own for name, (own, other) in pairs.items() if own not in (None, empty) and other not in (own, empty)}

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts to a condition of ``len(prompts)`` rows. The one encoder of training, validation and generation.

        The empty prompt is the null prompt: its row is what the pipeline itself guides away from.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own prediction (typed by ``process``), ``(B, C, H, W)`` in float32; ``t`` is ``(B,)``."""

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each tensor that `encode` makes, told from configs alone: what `wadi plan` needs.

        Raises:
            WadiError: if the family does not say.
        """
        raise WadiError(
            f"{type(self).__name__} does not say how large its conditions are, so the memory of a step cannot be told. "
            "Expected a method condition_shapes() in its backbone."
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` to images ``(B, 3, height, width)`` in ``[0, 1]``, float32.

        Inverse of the autoencoder's normalisation, then the autoencoder in its own dtype (in float32 where its config says
        that half precision overflows).

        Raises:
            WadiError: if an image contains NaN or infinity.
        """
        return autoencoder.decode(self.pipeline.vae, latents)

    def encode_images(self, images: Tensor, batch: int = 4) -> Tensor:
        """Images ``(B, 3, height, width)`` in ``[0, 1]`` to latents ``(B, C, H, W)``, float32: the inverse of `decode`.

        The one encoder of customisation, image to image and inversion. A family that overrides `decode` overrides this too.
        """
        return autoencoder.encode(self.pipeline.vae, images, batch)

    def call_latents(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` in the shape and dtype that a call of the pipeline takes as its ``latents``."""
        return latents.to(self.network.dtype)

    def sampler(self) -> Any:
        """A fresh diffusers scheduler for the teacher's deterministic many-step sampling, first order."""
        return schedulers.sampler(self.pipeline.scheduler, self.image_tokens)

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """Sigmas that the pipeline's call hands its scheduler for ``steps`` steps; None = the scheduler chooses its own."""
        return None

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the network, on which the shift of some flow models depends."""
        return (self.latent_shape[1] // self.patch) * (self.latent_shape[2] // self.patch)

    # --- guidance -----------------------------------------------------------------------------------------------------------
    # A guidance scale w is diffusers' convention for the whole package: uncond + w (cond - uncond), and 1 means none.

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """Mix the network's predictions of two passes, ``(B, C, H, W)`` each, as the pipeline's call does at this scale.

        A family whose pipeline also renormalises the mixture overrides this.
        """
        return unconditional + guidance_scale * (conditional - unconditional)

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for two passes mixed by `guided` at a scale above 1.

        A family whose pipeline names or counts the scale in another way (``true_cfg_scale``, ``w - 1``) overrides this.
        """
        return {"guidance_scale": guidance_scale}

    def guided_call(self, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments with which a call of the pipeline generates at this guidance scale; at 1 those of `call`.

        Raises:
            WadiError: if the scale is below 1, which no pipeline can do.
        """
        if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
            raise WadiError(
                f"The guidance scale is {guidance_scale}. A pipeline's call takes 1 (no guidance) or more: give such a scale."
            )
        return self.call if guidance_scale == 1 else self.call | self.guidance_arguments(guidance_scale)

    @classmethod
    def teacher_guidance(cls, given: float | None, otherwise: float) -> float:
        """Return the scale that the user gave, or else the family's `default_guidance`, or else ``otherwise``."""
        if given is not None:
            return given
        return otherwise if cls.default_guidance is None else cls.default_guidance

    @property
    def call(self) -> dict[str, Any]:
        """Arguments with which a plain call of the pipeline draws without guidance at this resolution."""
        height, width = self.resolution
        return {"guidance_scale": self.no_guidance, "height": height, "width": width}

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        found: torch.device = next(self.network.parameters()).device
        return found


def default_argument(pipeline: Any, name: str) -> Any:
    """The default of an argument of a pipeline's call, so that what is trained is what a plain call does later."""
    if isinstance(pipeline, Outline):
        import diffusers

        pipeline_class = getattr(diffusers, pipeline.pipeline_class)
    else:
        pipeline_class = type(pipeline)
    return inspect.signature(pipeline_class.__call__).parameters[name].default


def where_empty(prompts: Sequence[str], null: Tensor, encoded: Tensor) -> Tensor:
    """``encoded`` ``(B, ...)`` with the rows of empty prompts taken from ``null`` ``(B, ...)``."""
    empty = torch.tensor([prompt == "" for prompt in prompts], device=encoded.device)
    return torch.where(empty.view(-1, *([1] * (encoded.ndim - 1))), null, encoded)
