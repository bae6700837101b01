"""Generate the images of a request: one request at a time, whatever the number of visitors.

A call composes its own copy of the pipeline (`wadi.pipelines.compose`). It shares the weights but neither scheduler nor size,
so that no request leaves anything behind for the next one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps

from wadi.app.models import Models
from wadi.app.request import Limits, Request
from wadi.backbones import from_pipeline
from wadi.errors import WadiError, short_repr
from wadi.io.grids import save_png
from wadi.io.images import open_image, to_rgb
from wadi.io.wording import counted
from wadi.pipelines.compose import Composition, Control, compose
from wadi.pipelines.generate import Generated, Sampling, generate_images
from wadi.sampling import check_steps
from wadi.zoo.paths import NAME as ZOO


@dataclass(frozen=True)
class Images:
    """Images of one generator: the seed of each, the number of steps, and the time per image in milliseconds."""

    images: list[Image.Image]
    seeds: list[int]
    steps: int
    ms: float


@dataclass
class Studio:
    """Generate images of the page's students and teachers.

    Attributes:
        models: the students.
        limits: bounds on a request.
        controls: name on the page -> ControlNet or T2I-Adapter (``zoo``, folder, Hub id). The embedded one is offered for
            students of the embedded teacher only.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
    controls: Mapping[str, str] = field(default_factory=lambda: {ZOO: ZOO})

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}

    def student(self, request: Request) -> Images:
        """Generate the student's images.

        Raises:
            WadiError: if the model, the control or an uploaded image cannot be used, or the size is out of bounds.
        """
        with self._lock, TemporaryDirectory(prefix="wadi-app-") as folder:
            pipeline = copy.copy(self.models.student(request.model))
            native = from_pipeline(pipeline).resolution
            size = self._size(request, native)
            composition = Composition(
                controls=self._controls(request, size or native, Path(folder)),
                size=size,
                steps=request.steps,
                init=self._upload(request.init, "start image", size or native, Path(folder)),
                strength=request.strength,
            )
            composed = compose(pipeline, composition)
            composed.pipeline.set_progress_bar_config(disable=True)
            with composed.at_size():
                sampling = composed.sampling(batch=request.count)
                done = generate_images(composed.pipeline, *_rows(request), sampling)
            return _images(request, done, int(sampling.call.get("num_inference_steps", sampling.steps)))

    def teacher(self, request: Request) -> Images:
        """Generate the teacher's images of the same prompt and seeds, in ``request.teacher_steps`` steps.

        Raises:
            WadiError: if there is no teacher, or its schedule has fewer steps.
        """
        steps = request.teacher_steps or 1
        with self._lock:
            pipeline = copy.copy(self.models.teacher(request.model))
            backbone = from_pipeline(pipeline)
            check_steps(backbone, steps, "Teacher's steps")
            sampling = Sampling(steps, backbone.teacher_guidance(None, 2.0), request.count)
            return _images(request, generate_images(pipeline, *_rows(request), sampling), steps)

    def controls_of(self, model: str) -> list[str]:
        """Return the names of the controls to offer for a model. Only a call shows whether one fits."""
        try:
            teacher = self.models.source(model).teacher
        except WadiError:  # the folder is gone: generating says so
            teacher = None
        return [name for name, source in self.controls.items() if source != ZOO or teacher == ZOO]

    def _size(self, request: Request, native: tuple[int, int]) -> tuple[int, int] | None:
        """Return the size to set on the pipeline; None for the student's own."""
        if request.size in (None, native):
            return None
        largest = self.limits.side or 2 * max(native)
        if request.size is not None and max(request.size) > largest:
            raise WadiError(f"The size is {request.size[1]} x {request.size[0]}. Give sides of at most {largest:,} pixels.")
        return request.size

    def _controls(self, request: Request, size: tuple[int, int], folder: Path) -> list[Control]:
        if request.control is None:
            return []
        names = self.controls_of(request.model)
        if request.control not in names:
            choices = f"Choose one of {', '.join(names)}." if names else "This model has none."
            raise WadiError(f"There is no control {short_repr(request.control)} for model {request.model!r}. {choices}")
        if request.control not in self._loaded:
            from wadi.extras.control.load import load_control

            self._loaded[request.control] = load_control(self.controls[request.control], self.models.place["dtype"])
        image = self._upload(request.condition, "control's image", size, folder)
        assert image is not None
        return [Control(self._loaded[request.control], image, request.condition_kind, request.control_scale)]

    def _upload(self, path: str | None, what: str, size: tuple[int, int], folder: Path) -> Path | None:
        """Return the file of an uploaded image, cropped around its centre to the aspect ratio of ``size``."""
        if path is None:
            return None
        try:
            image = open_image(path, f"The {what}")
            if image.mode not in ("RGBA", "LA"):  # a condition must not be transparent, so that is left to the control
                image = to_rgb(image, f"The {what}")
        except WadiError as error:  # visitors see the name of their file, not where the server keeps it
            raise WadiError(str(error).replace(str(path), Path(path).name)) from error
        height, width = size
        scale = min(image.width / width, image.height / height)
        crop = (max(1, round(width * scale)), max(1, round(height * scale)))
        if crop != image.size:
            image = ImageOps.fit(image, crop, Image.Resampling.NEAREST)
        file = folder / f"{'init' if what.startswith('start') else 'condition'}.png"
        save_png(image, file)
        return file


def _rows(request: Request) -> tuple[list[str], list[int]]:
    """Return the prompt and the seed of each image."""
    return [request.prompt] * request.count, [request.seed + i for i in range(request.count)]


def _images(request: Request, done: Generated, steps: int) -> Images:
    return Images(done.images, _rows(request)[1], steps, done.ms_per_image)


def caption(title: str, images: Images) -> str:
    """Return a line such as ``Student: 1 step, 22 ms per image``."""
    return f"{title}: {counted(images.steps, 'step')}, {images.ms:,.0f} ms per image"
