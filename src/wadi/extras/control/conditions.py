"""Condition images: what a ControlNet or T2I-Adapter is shown, made from an ordinary picture.

`canny` and `scribble` are torch alone; `depth` and `pose` ask a network of `transformers` (a folder or Hub id).
Every maker takes an 8-bit RGB picture (`read_picture`, `as_rgb`) and gives one of the same size. `edge_map`, `soft_edges` and
`gradient` are the same arithmetic on batches: images ``(B, 3, H, W)`` in ``[0, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import PIXELS, is_transparent, read_image, to_rgb
from wadi.io.weight_checks import load_complete

LOW, HIGH, SIGMA = 0.1, 0.2, 0.8  # thresholds on the gradient (a black-white step is 1), blur in pixels
SCRIBBLE_SIGMA, SCRIBBLE_WIDTH = 2.5, 5
DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
POSE_MODEL = "usyd-community/vitpose-base-simple"
RATIO = 0.02  # relative difference of aspect ratios up to which a picture is resized


# --- pictures in ------------------------------------------------------------------------------------------------------------


def read_picture(path: str | Path) -> Image.Image:
    """A picture file as 8-bit RGB; see `wadi.io.images`.

    Raises:
        WadiError: if there is no such file, it is no picture, or its mode is not offered.
    """
    return read_image(path, "Condition image")


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB, what is transparent laid on white.

    Raises:
        WadiError: if the numbers have no known range (32-bit floats, integers beyond 16 bits).
    """
    return to_rgb(picture, "The condition image")


def finished(picture: Image.Image) -> Image.Image:
    """A condition image that is one already, as 8-bit RGB.

    Raises:
        WadiError: as `as_rgb`; and if it is transparent: white would be a condition, and black another one.
    """
    if is_transparent(picture):
        raise WadiError(
            "The condition image has transparent pixels. Lay it on the background that the network expects (black for edges, "
            "depth and pose) and save it without transparency."
        )
    return as_rgb(picture)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``picture`` at ``size`` ``(height, width)``: as it is, or resized where the aspect ratio is the same.

    Raises:
        WadiError: if the aspect ratio is another one, or the size is too large.
    """
    height, width = size
    if picture.size == (width, height):
        return picture
    if height * width > PIXELS:
        raise WadiError(f"The wanted size {width} x {height} has {height * width:,} pixels. Give at most {PIXELS:,}.")
    if abs(picture.width * height / (picture.height * width) - 1) > RATIO:
        raise WadiError(
            f"The condition image is {picture.width} x {picture.height}; the picture to draw is {width} x {height}. Expected "
            "the same aspect ratio: crop the image, or draw at its size."
        )
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as ``(1, 3, H, W)`` in ``[0, 1]``."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def to_picture(mask: Tensor) -> Image.Image:
    """``(1, H, W)`` or ``(H, W)``, boolean or in ``[0, 1]``, as an RGB picture: 1 is white."""
    return Image.fromarray((mask.float().reshape(mask.shape[-2:]) * 255).round().byte().cpu().numpy()).convert("RGB")


# --- edges ------------------------------------------------------------------------------------------------------------------


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(B, C, H, W)``, the border repeated outwards."""
    if sigma <= 0:
        return images
    reach = max(1, int(3 * sigma + 0.5))
    x = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=images.shape[1])


def gradient(images: Tensor, sigma: float = SIGMA) -> tuple[Tensor, Tensor]:
    """``(d/dx, d/dy)``, each ``(B, 1, H, W)``: Sobel's, of the channel where it is longest; 1 at an unblurred 0-1 step.

    The longest of the channels rather than the grey's: red on green of one brightness is an edge.
    """
    channels = images.shape[1]
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device, dtype=images.dtype) / 4
    padded = F.pad(blurred(images, sigma), (1,) * 4, mode="replicate")
    dx = F.conv2d(padded, sobel.expand(channels, 1, 3, 3), groups=channels)
    dy = F.conv2d(padded, sobel.T.expand(channels, 1, 3, 3), groups=channels)
    longest = (dx**2 + dy**2).argmax(1, keepdim=True)
    return dx.gather(1, longest), dy.gather(1, longest)


def soft_edges(images: Tensor, softness: float = 0.15, sigma: float = SIGMA) -> Tensor:
    """``m^2 / (m^2 + softness^2)`` of the gradient's length ``m``: an edge map with a derivative, ``(B, 1, H, W)``."""
    dx, dy = gradient(images, sigma)
    squared = dx**2 + dy**2
    return squared / (squared + softness**2)


@torch.no_grad()
def edge_map(images: Tensor, low: float = LOW, high: float = HIGH, sigma: float = SIGMA) -> Tensor:
    """Canny's edges (1986) as booleans ``(B, 1, H, W)``: crests of the gradient above ``low`` joined to one above ``high``.

    Raises:
        WadiError: unless ``0 < low <= high``.
    """
    if not 0 < low <= high:
        raise WadiError(f"Canny's thresholds are low {low} and high {high}. Expected 0 < low <= high; a 0-1 step is 1.")
    dx, dy = gradient(images, sigma)
    length = torch.hypot(dx, dy)
    crest = length * _is_crest(dx, dy, length)
    weak, edges = crest > low, crest > high
    while True:  # strong edges grow along weak ones until nothing changes
        grown = thickened(edges, 1) & weak
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _is_crest(dx: Tensor, dy: Tensor, length: Tensor) -> Tensor:
    """Where ``length`` is greatest across the edge, its direction rounded to 45 degrees."""
    height, width = length.shape[-2:]
    padded = F.pad(length, (1,) * 4)
    sector = (torch.atan2(dy, dx) / (torch.pi / 4)).round().long() % 4
    crest = torch.zeros_like(length, dtype=torch.bool)
    for i, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[..., 1 - y : 1 - y + height, 1 - x : 1 - x + width]
        # ">" on one side alone: of two equal neighbours one is the edge
        crest |= (sector == i) & (length > behind) & (length >= ahead)
    return crest


def thickened(mask: Tensor, radius: int) -> Tensor:
    """Booleans ``(B, 1, H, W)`` grown by ``radius`` pixels each way (a square)."""
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0


def canny(picture: Image.Image, low: float = LOW, high: float = HIGH, sigma: float = SIGMA) -> Image.Image:
    """Canny's edges of a picture, white on black."""
    return to_picture(edge_map(to_tensor(as_rgb(picture)), low, high, sigma)[0])


def scribble(picture: Image.Image) -> Image.Image:
    """Thick coarse lines, white on black, as a hand might draw them: edges of the blurred picture, five pixels wide.

    A stand-in for the learned sketches (HED, PiDiNet) that scribble ControlNets were trained on.
    """
    edges = edge_map(to_tensor(as_rgb(picture)), LOW / 2, HIGH / 2, SCRIBBLE_SIGMA)
    return to_picture(thickened(edges, SCRIBBLE_WIDTH // 2)[0])


# --- networks ---------------------------------------------------------------------------------------------------------------


def depth(picture: Image.Image, model: str = DEPTH_MODEL) -> Image.Image:
    """Inverse depth by a depth-estimation network of `transformers`, scaled to 0..255: near is white.

    Raises:
        WadiError: if ``model`` (a folder or Hub id) cannot be loaded.
    """
    from transformers import AutoModelForDepthEstimation

    picture = as_rgb(picture)
    network, processor = _load(AutoModelForDepthEstimation, model)
    with torch.no_grad():
        found = network(**processor(images=picture, return_tensors="pt"))
    size = (picture.height, picture.width)
    near = F.interpolate(found.predicted_depth[None].float(), size=size, mode="bicubic", align_corners=False)[0, 0]
    spread = (near.max() - near.min()).clamp_min(1e-12)
    return to_picture((near - near.min()) / spread)


# OpenPose's 18 points (nose, neck, right arm, left arm, right leg, left leg, eyes, ears) in COCO's 17; the neck lies between
# COCO's shoulders, 5 and 6. Limbs in OpenPose's order, which sets their colours.
_POINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0), (0, 14),
    (14, 16), (0, 15), (15, 17),
)  # fmt: skip
CONFIDENT = 0.3


def pose(picture: Image.Image, model: str = POSE_MODEL) -> Image.Image:
    """The skeleton of the one person that fills the picture, in OpenPose's colours on black, by ViTPose of `transformers`.

    Raises:
        WadiError: if scipy is missing (extra ``control``) or ``model`` cannot be loaded.
    """
    _require_scipy()
    from transformers import VitPoseForPoseEstimation

    picture = as_rgb(picture)
    network, processor = _load(VitPoseForPoseEstimation, model)
    boxes = [[[0.0, 0.0, float(picture.width), float(picture.height)]]]
    inputs = processor(images=picture, boxes=boxes, return_tensors="pt")
    experts = getattr(network.config.backbone_config, "num_experts", 1)
    with torch.no_grad():
        found = network(**inputs, **({"dataset_index": torch.zeros(1, dtype=torch.long)} if experts > 1 else {}))
    person = processor.post_process_pose_estimation(found, boxes=boxes)[0][0]
    points = {int(label): tuple(xy.tolist()) for label, xy, score in _scored(person) if score >= CONFIDENT}
    return skeleton(points, picture.size)


def _scored(person: dict[str, Tensor]) -> zip[tuple[Any, ...]]:
    return zip(person["labels"], person["keypoints"], person["scores"], strict=True)


def skeleton(points: dict[int, tuple[float, float]], size: tuple[int, int]) -> Image.Image:
    """COCO key points by number, each ``(x, y)`` in pixels, drawn as OpenPose draws them; ``size`` is ``(width, height)``."""
    import colorsys

    named = {i: points[coco] for i, coco in enumerate(_POINTS) if coco is not None and coco in points}
    if 5 in points and 6 in points:
        (x5, y5), (x6, y6) = points[5], points[6]
        named[1] = ((x5 + x6) / 2, (y5 + y6) / 2)
    colours = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)]
    sheet = Image.new("RGB", size)
    pen, thick = ImageDraw.Draw(sheet), max(1, round(min(size) / 128))
    for i, (a, b) in enumerate(_LIMBS):
        if a in named and b in named:
            pen.line([named[a], named[b]], tuple(int(0.6 * c) for c in colours[i]), 2 * thick)
    for i, (x, y) in named.items():
        pen.ellipse([x - thick, y - thick, x + thick, y + thick], colours[i])
    return sheet


def _require_scipy() -> None:
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise WadiError("Poses need scipy, which is not installed. Expected the extra: pip install 'wadi-onestep[control]'.")


def _load(network_class: Any, model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    try:
        network = load_complete(network_class, model, f"{network_class.__name__} {model!r}")
        return network.eval(), AutoImageProcessor.from_pretrained(model)
    except WadiError:
        raise
    except Exception as error:  # transformers and huggingface_hub have exception classes of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WadiError(
            f"{model!r} could not be loaded as {network_class.__name__}: {first} Expected its folder, or a Hub id within reach."
        ) from error


# --- all of them ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., Image.Image]] = {"canny": canny, "scribble": scribble, "depth": depth, "pose": pose}


def condition(kind: str, picture: Image.Image, model: str | None = None) -> Image.Image:
    """The condition image of a picture; ``kind`` one of `KINDS`, or ``'none'``: the picture is one already.

    Raises:
        WadiError: if there is no such kind, or a ``model`` is given to one that asks none.
    """
    if kind == "none":
        return finished(picture)
    if kind not in KINDS:
        raise WadiError(f"There is no condition {kind!r}. Expected one of {', '.join(KINDS)}, or none for a finished one.")
    if model is None:
        return KINDS[kind](picture)
    if kind not in ("depth", "pose"):
        raise WadiError(f"A model was given for {kind!r}, which uses none. Expected it with depth or pose alone.")
    return KINDS[kind](picture, model)
