"""Put tokens, LoRAs, another size, controls, more steps and a start image on a pipeline, in the one order that works.

    tokens, LoRAs    change the text encoder and the weights of the network, so they come first
    size             the condition images and the start image are fitted to it
    start image      read before a control is loaded, so that a wrong file is reported at once
    controls         make a new pipeline around the changed network
    steps, strength  replace the scheduler of that pipeline

Example, with a student (`wadi.load`) or any other one-step pipeline:

    composed = compose(wadi.load("runs/mine"), Composition(loras=(Lora("style.safetensors", 0.8),), size=(1024, 1792)))
    with composed.at_size():
        images = generate_images(composed.pipeline, ["red apple"], [7], composed.sampling()).images

What comes out is an ordinary diffusers pipeline and the arguments of its call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wadi.backbones import from_pipeline
from wadi.extras import image_to_image, steps
from wadi.extras.high_resolution import resize
from wadi.extras.high_resolution.blocks import Blocks, Factor
from wadi.pipelines.generate import Sampling, Start


@dataclass(frozen=True)
class Token:
    """A learned token (textual inversion): its file, and its name in prompts if it is not the one that the file gives."""

    file: str | Path
    name: str | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA, or the adapter folder of a customised teacher, and its scale."""

    file: str | Path
    scale: float = 1.0


@dataclass(frozen=True)
class Control:
    """A ControlNet, T2I-Adapter or IP-Adapter and its condition image.

    Attributes:
        source: ``'zoo'``, a folder, a Hub id, a file or a loaded ControlNet, as in `wadi.extras.control.pipeline.with_control`.
        image: file of the condition image.
        kind: turn the image into this kind of condition first (canny, scribble, depth, pose); 'none' = use it as it is.
        scale: strength of the control.
        mode: number of the kind of condition, for a union ControlNet of FLUX.
    """

    source: str | Path | Any
    image: str | Path
    kind: str = "none"
    scale: float = 1.0
    mode: int | None = None


@dataclass(frozen=True)
class Composition:
    """What to put on a pipeline. Sizes are ``(height, width)`` in pixels.

    Attributes:
        tokens, loras, controls: in the order in which they are applied.
        image_encoder: folder of the CLIP vision model of an IP-Adapter; None = found near its file.
        size: size of the images; None = the pipeline's own.
        redilate: with ``size``, factor by which convolutions see further; None = as the size needs it.
        redilate_blocks: with ``size``, blocks to re-dilate; None = the deepest.
        disperse: with ``size``, use dispersed kernels, made for a factor of two.
        tiled_vae: decode in tiles also below a megapixel.
        steps: steps of the student; None = those that it was trained for.
        init: file of the image to start from.
        strength: with ``init``, how far to leave it, above 0 (not at all) up to 1.
    """

    tokens: Sequence[Token] = ()
    loras: Sequence[Lora] = ()
    controls: Sequence[Control] = ()
    image_encoder: str | Path | None = None
    size: tuple[int, int] | None = None
    redilate: Factor | None = None
    redilate_blocks: Blocks = None
    disperse: bool = False
    tiled_vae: bool = False
    steps: int | None = None
    init: str | Path | None = None
    strength: float = 0.8


@dataclass(frozen=True)
class Composed:
    """A pipeline with everything of a `Composition` on it, and how to call it.

    Attributes:
        pipeline: the pipeline to call; with a control it is not the one that `compose` received.
        native: ``(height, width)`` that the student was trained for.
        size: ``(height, width)`` of its images.
        call, start: for `wadi.pipelines.generate.Sampling`.
        composition: the parts that were put on it.
    """

    pipeline: Any
    native: tuple[int, int]
    size: tuple[int, int]
    composition: Composition
    call: dict[str, Any] = field(default_factory=dict)
    start: Start | None = None

    def sampling(self, batch: int = 8) -> Sampling:
        """Return how to call the pipeline, with ``batch`` images per call."""
        return Sampling(batch=batch, call=self.call, start=self.start)

    @contextmanager
    def at_size(self) -> Iterator[None]:
        """Within the block the network and the autoencoder work at ``size``: re-dilated, interpolated, in tiles.

        Raises:
            WadiError: if the factor or the blocks do not apply to the network.
        """
        wanted = self.composition
        if wanted.size is None:
            with resize.tiled_decoding(self.pipeline.vae, wanted.tiled_vae):
                yield
            return
        tiled = True if wanted.tiled_vae else None
        factor, blocks = wanted.redilate, wanted.redilate_blocks
        with resize.enlarged(self.pipeline, self.native, self.size, factor, blocks, wanted.disperse, tiled):
            yield


def compose(pipeline: Any, composition: Composition) -> Composed:
    """Put everything of ``composition`` on ``pipeline``, whose weights and scheduler change.

    Generate within ``with composed.at_size():``.

    Raises:
        WadiError: if a file is missing or damaged, or something does not fit the pipeline.
    """
    customise(pipeline, composition.tokens, composition.loras)
    backbone = from_pipeline(pipeline)
    native = backbone.resolution
    size = native
    if composition.size is not None:
        size = composition.size
        resize.check_resolution(pipeline, size)
        resize.set_resolution(pipeline, size)
    init = None if composition.init is None else image_to_image.read_init(composition.init, size)
    call: dict[str, Any] = {}
    if composition.controls:
        pipeline, call = add_controls(pipeline, composition.controls, size, composition.image_encoder)
    strength = 1.0 if init is None else composition.strength
    schedule = steps.student_schedule(pipeline.scheduler, backbone.student_timesteps, composition.steps, strength)
    pipeline.scheduler = schedule.scheduler
    call |= schedule.call
    start = None
    if init is not None:
        with resize.tiled_decoding(pipeline.vae, composition.tiled_vae or resize.is_large(size)):
            start = image_to_image.start_from(backbone, init, schedule)
    return Composed(pipeline, native, size, composition, call, start)


def customise(pipeline: Any, tokens: Sequence[Token] = (), loras: Sequence[Lora] = ()) -> None:
    """Put ``tokens`` and ``loras`` into the text encoder and the weights of ``pipeline``, each in its order.

    Raises:
        WadiError: if a file is missing or damaged, or does not fit the pipeline.
    """
    if tokens:
        from wadi.extras.relation.token_file import add_token

        for token in tokens:
            add_token(pipeline, Path(token.file), token.name)
    if loras:
        from wadi.extras.lora.apply import apply_lora

        for lora in loras:
            apply_lora(pipeline, lora.file, lora.scale)


def add_controls(
    pipeline: Any, controls: Sequence[Control], size: tuple[int, int], image_encoder: str | Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of ``pipeline`` under all ``controls``, and the arguments of its call.

    Args:
        size: ``(height, width)`` to which an image is brought before it is turned into a condition: lines fade when shrunk.
        image_encoder: see `Composition`.
    Raises:
        WadiError: if a file is missing or damaged, or a control does not fit the pipeline.
    """
    from wadi.extras.control.condition_images import as_rgb, fit_image
    from wadi.extras.control.conditions import condition
    from wadi.extras.control.pipeline import arguments_of_several, is_image_prompt, with_controls
    from wadi.io.images import open_image

    images = []
    for control in controls:
        image = open_image(control.image, "Condition image")
        if control.kind != "none":
            image = condition(control.kind, fit_image(as_rgb(image), size))
        images.append(image)
    sources = [control.source for control in controls]
    image_prompts = [is_image_prompt(source) for source in sources]
    controlled = with_controls(pipeline, sources, image_encoder)
    scales, modes = [control.scale for control in controls], [control.mode for control in controls]
    return controlled, arguments_of_several(controlled, images, scales, image_prompts, modes)
