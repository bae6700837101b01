"""The contract of a model family: `Backbone`.

A backbone is built from a loaded diffusers pipeline. It knows the inputs, latents and layers of its model. It does not know
adapters, objectives or accelerate.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from wadi.backbones import features
from wadi.backbones.condition import Condition, Shape
from wadi.backbones.truncation_notice import print_truncation_once
from wadi.diffusion import autoencoder, schedulers
from wadi.diffusion.process import Process
from wadi.errors import WadiError

RESOLUTION = "_wadi_resolution"  # key in a pipeline's config: the size of a student, if it is not the model's own
TIMESTEPS = "_wadi_timesteps"  # key in a pipeline's config: the timesteps of a student of several steps


def stored_timesteps(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the timesteps of a student of several steps from its pipeline's config; empty if the config has none.

    Raises:
        WadiError: if they are something else than falling timesteps.
    """
    stored = config.get(TIMESTEPS)
    return () if stored is None else schedulers.check_timesteps(stored, "model_index.json")


class Backbone(ABC):
    """A text-to-image network with its text encoders, autoencoder and noising process.

    A family implements `encode_with_gradient` and `predict`, sets the class attributes, and overrides what differs in its
    model.

    Class attributes:
        component: name of the network in the pipeline, ``"transformer"`` or ``"unet"``.
        student_targets, fake_targets: the layers that the adapters of the student and the fake model go on by default. Regular
            expressions that must match the full module name.
        no_guidance: ``guidance_scale`` of the pipeline's call for one conditional pass. A network that takes a guidance scale
            as an input receives this value in every pass, also in training.
        default_guidance: scale of the teacher's many steps if the user gives none; None = the command's default.

    Attributes:
        pipeline: the diffusers pipeline it was built from.
        network: the denoiser whose weights the adapters rotate.
        process: ``alpha_t``, ``sigma_t`` and the prediction type, from the pipeline's own scheduler.
        resolution: ``(height, width)`` of an image in pixels. Unless given, it is the size that a student's pipeline was saved
            with, or the model's own size.
        latent_shape: ``(C, H, W)`` of one latent.
    """

    component: ClassVar[str] = "transformer"
    student_targets: str  # a family may set these per network; see `default_targets`
    fake_targets: str
    no_guidance: ClassVar[float] = 0.0
    default_guidance: ClassVar[float | None] = None
    condition_has_size: bool = False  # whether the condition of a prompt depends on `resolution`

    def __init__(self, pipeline: Any, resolution: tuple[int, int] | None = None) -> None:
        print_truncation_once()
        self.pipeline = pipeline
        self.network: Any = getattr(pipeline, self.component)  # an nn.Module with a config
        self.process = Process.from_scheduler(pipeline.scheduler)
        self.student_targets, self.fake_targets = self.default_targets(self.network.config)
        saved = pipeline.config.get(RESOLUTION)
        native = tuple(saved) if saved else self.native_resolution(self.network.config, self.scale)
        self.resolution = self.check_resolution(resolution or native)
        height, width = self.resolution
        self.latent_shape = (self.latent_channels(self.network.config), height // self.scale, width // self.scale)

    @classmethod
    def default_targets(cls, config: Any) -> tuple[str, str]:
        """Return `student_targets` and `fake_targets` for a network with this ``config``."""
        return cls.student_targets, cls.fake_targets

    # --- shapes -------------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> int:
        """Pixels per latent, in each direction."""
        return int(self.pipeline.vae_scale_factor)

    @classmethod
    def autoencoder_scale(cls, config: Mapping[str, Any]) -> int:
        """Return the pipeline's ``vae_scale_factor`` from the ``config`` of its autoencoder. `wadi plan` has no pipeline.

        Raises:
            WadiError: if the config is of an unknown kind. The family must then override this.
        """
        return autoencoder.scale_of(config)

    @property
    def patch(self) -> int:
        """Latents per token of the network, in each direction. Height and width in latents are multiples of it."""
        return int(self.network.config.get("patch_size") or 1)

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """Return the ``(height, width)`` in pixels that a network with this ``config`` was trained for."""
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
        """Return the number of channels of a latent."""
        return int(config.in_channels)

    def check_resolution(self, resolution: tuple[int, int]) -> tuple[int, int]:
        """Return ``resolution`` if the model can generate it.

        Raises:
            WadiError: if a side is not a multiple of the size that the autoencoder and the network need.
        """
        multiple = self.scale * self.patch
        if any(side < multiple or side % multiple for side in resolution):
            near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in resolution)
            raise WadiError(
                f"resolution is {resolution[0]} x {resolution[1]}. {type(self.network).__name__} needs multiples of {multiple} "
                f"({self.scale} pixels per latent, {self.patch} per patch): try {near}."
            )
        return resolution

    def remember_resolution(self) -> None:
        """Write `resolution` into the pipeline's config if it is not the model's own, so that it is saved with it."""
        if self.resolution != self.native_resolution(self.network.config, self.scale):
            self.pipeline.register_to_config(**{RESOLUTION: list(self.resolution)})

    def remember_timesteps(self, timesteps: Sequence[int]) -> None:
        """Give the pipeline the scheduler of a student with these timesteps, and write several into the pipeline's config."""
        self.pipeline.scheduler = schedulers.student_scheduler(self.pipeline.scheduler, timesteps)
        if len(timesteps) > 1 or self.pipeline.config.get(TIMESTEPS):
            self.pipeline.register_to_config(**{TIMESTEPS: list(timesteps) if len(timesteps) > 1 else None})

    @property
    def student_timesteps(self) -> tuple[int, ...]:
        """Timesteps of the student in this pipeline; that of its scheduler for a pipeline that does not say.

        Raises:
            WadiError: if the pipeline's config says something else than a list of timesteps.
        """
        timesteps = stored_timesteps(self.pipeline.config) or (schedulers.timestep_of(self.pipeline.scheduler),)
        last = Process.from_scheduler(self.pipeline.scheduler).last_timestep
        if timesteps[0] > last:
            raise WadiError(
                f"model_index.json has the timesteps {list(timesteps)}, and the pipeline's schedule ends at {last}. Restore "
                "the file as it was written."
            )
        return timesteps

    # --- prompts, predictions, images ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts into a condition with ``len(prompts)`` rows, without gradients.

        This is the only encoder of prompts, in training, validation, generation and evaluation. The empty prompt is the null
        prompt: its row is the condition that the pipeline itself guides away from.
        """
        return self.encode_with_gradient(prompts)

    @abstractmethod
    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Do the work of `encode`. Gradients flow into the text encoders, which learning a new token needs."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's own prediction (see `process`), ``(B, C, H, W)`` in float32. ``t`` has shape ``(B,)``."""

    def as_seen(self, x_t: Tensor) -> Tensor:
        """Return ``x_t`` rounded to the network's dtype, in its own dtype.

        A student's image is computed from its prediction *and* ``x_t``: ``(x_t - sigma eps) / alpha``. Both must belong to the
        same ``x_t``, or the rounding error is multiplied by ``1 / alpha``. A call of the pipeline holds latents in the
        network's dtype.
        """
        return x_t.to(self.network.dtype).to(x_t.dtype)

    def encode_defaults(self) -> dict[str, Any]:
        """Return arguments for the pipeline's ``encode_prompt``, where the pipeline's call has other defaults than it.

        With them, training cuts long prompts and cleans captions exactly as a plain call does.
        """
        encoding = inspect.signature(self.pipeline.encode_prompt).parameters
        calling = inspect.signature(type(self.pipeline).__call__).parameters
        pairs = {name: (calling[name].default, encoding[name].default) for name in encoding if name in calling}
        empty = inspect.Parameter.empty
        return {name: call for name, (call, other) in pairs.items() if call not in (None, empty) and other not in (call, empty)}

    def condition_shapes(self) -> Mapping[str, Shape]:
        """Return the shape of one row of each tensor of a condition, from configs alone. `wadi plan` needs it.

        A tensor of whole numbers or booleans has its dtype too: ``((tokens,), torch.bool)``.

        Raises:
            WadiError: if the family does not implement it.
        """
        raise WadiError(
            f"{type(self).__name__} has no method condition_shapes(), so the memory of a step cannot be estimated. Add the "
            "method to the backbone."
        )

    @contextmanager
    def captured_features(self) -> Iterator[list[Tensor]]:
        """Within the block, collect the features of the network's middle block at each call of `predict`.

        Features are float32, ``(B, tokens, feature_width)``, with their graph. See `wadi.backbones.features`.

        Raises:
            WadiError: if the network has no such block.
        """
        with features.captured(self.network) as collected:
            yield collected

    @property
    def feature_width(self) -> int:
        """Number of channels of the features.

        Raises:
            WadiError: if the network has no middle block.
        """
        return features.width(self.network)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, C, H, W)`` into images ``(B, 3, height, width)`` in ``[0, 1]``, float32, without gradients.

        The autoencoder runs in its own dtype, or in float32 if its config says that half precision overflows.

        Raises:
            WadiError: if an image contains NaN or infinity.
        """
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Do the work of `decode`. Gradients flow from the images to the latents, which losses on images need."""
        return autoencoder.decode(self.pipeline.vae, latents)

    def encode_images(self, images: Tensor, batch: int = 4) -> Tensor:
        """Encode images ``(B, 3, height, width)`` in ``[0, 1]`` into latents ``(B, C, H, W)``, float32: the inverse of
        `decode`.

        This is the only encoder of images. A family that overrides `decode_with_gradient` overrides this too.
        """
        return autoencoder.encode(self.pipeline.vae, images, batch)

    # --- schedulers and plain calls of the pipeline -------------------------------------------------------------------------

    def sampler(self) -> Any:
        """Return a new diffusers scheduler for the teacher's many steps: deterministic, first order."""
        return schedulers.sampler(self.pipeline.scheduler, self.image_tokens)

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """Return the sigmas that the pipeline's call passes to its scheduler; None = the scheduler chooses its own."""
        return None

    def sampler_shift(self, steps: int) -> float:
        """Return ``mu``, which the pipeline's call passes to a scheduler that shifts its sigmas by resolution.

        The default is diffusers' ``calculate_shift``. A family whose pipeline has another formula overrides this.
        """
        return schedulers.resolution_shift(self.pipeline.scheduler.config, self.image_tokens)

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        """Return the arguments of ``set_timesteps`` of `sampler` for as many steps as the pipeline's call takes them."""
        sigmas = self.sampler_sigmas(steps)
        arguments: dict[str, Any] = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
        if self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = self.sampler_shift(steps)
        return arguments

    @property
    def image_tokens(self) -> int:
        """Number of tokens of one image in the network. The shift of some flow models depends on it."""
        return (self.latent_shape[1] // self.patch) * (self.latent_shape[2] // self.patch)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments with which a plain call of the pipeline generates without guidance at this resolution."""
        height, width = self.resolution
        return {"guidance_scale": self.no_guidance, "height": height, "width": width}

    def call_latents(self, latents: Tensor) -> Tensor:
        """Return latents ``(B, C, H, W)`` in the shape and dtype that a call of the pipeline takes as ``latents``."""
        return latents.to(self.network.dtype)

    def step_noise(self, generator: torch.Generator) -> Tensor:
        """Draw the noise ``(1, C, H, W)`` that a scheduler adds between two steps of a call, float32.

        A family whose pipeline gives latents of another shape to its scheduler overrides this.
        """
        return torch.randn((1, *self.latent_shape), generator=generator)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = next(self.network.parameters()).device
        return device

    # --- guidance -----------------------------------------------------------------------------------------------------------
    # A guidance scale w follows the diffusers convention everywhere in the package: uncond + w (cond - uncond); 1 means none.

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """Combine the network's predictions of two passes, ``(B, C, H, W)`` each, as the pipeline's call does at this scale.

        A family whose pipeline also rescales the result overrides this.
        """
        return unconditional + guidance_scale * (conditional - unconditional)

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for two passes combined by `guided`, at a scale above 1.

        A family whose pipeline has another name or convention for the scale (``true_cfg_scale``, ``w - 1``) overrides this.
        """
        return {"guidance_scale": guidance_scale}

    def guided_call(self, guidance_scale: float, prompts: int = 1) -> dict[str, Any]:
        """Return the arguments with which a call of the pipeline generates at this guidance scale; at 1 those of `call`.

        Args:
            prompts: number of prompts of the call. Not every pipeline repeats a single negative prompt.
        Raises:
            WadiError: if the scale is below 1. No pipeline supports that.
        """
        if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
            raise WadiError(
                f"The guidance scale is {guidance_scale}. A pipeline's call needs at least 1 (1 = no guidance): give such a "
                "scale."
            )
        if guidance_scale == 1:
            return self.call
        arguments = self.guidance_arguments(guidance_scale)
        if "negative_prompt" in arguments and prompts > 1:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * prompts
        return self.call | arguments

    @classmethod
    def teacher_guidance(cls, given: float | None, otherwise: float) -> float:
        """Return the scale that the user gave, or else the family's `default_guidance`, or else ``otherwise``."""
        if given is not None:
            return given
        return otherwise if cls.default_guidance is None else cls.default_guidance
