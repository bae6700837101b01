"""Depth maps and poses of an image, estimated by networks of `transformers` (a folder or Hub id)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from wadi.errors import WadiError, first_line
from wadi.extras.control.condition_images import as_rgb, to_image
from wadi.io.installation import require
from wadi.io.weight_checks import load_complete

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
POSE_MODEL = "usyd-community/vitpose-base-simple"


def depth(image: Image.Image, model: str = DEPTH_MODEL) -> Image.Image:
    """Return the inverse depth that a depth-estimation network finds, scaled to 0..255: near is white.

    Raises:
        WadiError: if ``model`` (a folder or Hub id) cannot be loaded.
    """
    from transformers import AutoModelForDepthEstimation

    image = as_rgb(image)
    network, processor = _load_network(AutoModelForDepthEstimation, model)
    with torch.no_grad():
        estimate = network(**processor(images=image, return_tensors="pt"))
    size = (image.height, image.width)
    near = F.interpolate(estimate.predicted_depth[None].float(), size=size, mode="bicubic", align_corners=False)[0, 0]
    spread = (near.max() - near.min()).clamp_min(1e-12)
    return to_image((near - near.min()) / spread)


# Number in COCO (17 points) of each of OpenPose's 18 points: nose, neck, right arm, left arm, right leg, left leg, eyes, ears.
# COCO has no neck: it is the middle of the shoulders, 5 and 6. Limbs are in OpenPose's order, which sets their colours.
_POINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0), (0, 14),
    (14, 16), (0, 15), (15, 17),
)  # fmt: skip
CONFIDENT = 0.3  # lowest score of a point that is drawn


def pose(image: Image.Image, model: str = POSE_MODEL) -> Image.Image:
    """Return the skeleton of the one person who fills the image, in OpenPose's colours on black, found by ViTPose.

    Raises:
        WadiError: if scipy is missing (extra ``control``) or ``model`` cannot be loaded.
    """
    require("control", "Estimating poses", "scipy")
    from transformers import VitPoseForPoseEstimation

    image = as_rgb(image)
    network, processor = _load_network(VitPoseForPoseEstimation, model)
    boxes = [[[0.0, 0.0, float(image.width), float(image.height)]]]
    inputs = processor(images=image, boxes=boxes, return_tensors="pt")
    experts = getattr(network.config.backbone_config, "num_experts", 1)
    with torch.no_grad():
        estimate = network(**inputs, **({"dataset_index": torch.zeros(1, dtype=torch.long)} if experts > 1 else {}))
    person = processor.post_process_pose_estimation(estimate, boxes=boxes)[0][0]
    points = {int(label): tuple(xy.tolist()) for label, xy, score in _scored(person) if score >= CONFIDENT}
    return skeleton(points, image.size)


def _scored(person: dict[str, Tensor]) -> zip[tuple[Any, ...]]:
    return zip(person["labels"], person["keypoints"], person["scores"], strict=True)


def skeleton(points: dict[int, tuple[float, float]], size: tuple[int, int]) -> Image.Image:
    """Draw a skeleton as OpenPose does.

    Args:
        points: ``(x, y)`` in pixels by number in COCO.
        size: ``(width, height)``.
    """
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


def _load_network(network_class: Any, model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    try:
        network = load_complete(network_class, model, f"{network_class.__name__} {model!r}")
        return network.eval(), AutoImageProcessor.from_pretrained(model)
    except WadiError:
        raise
    except Exception as error:  # transformers and huggingface_hub have exception classes of their own
        raise WadiError(
            f"{model!r} could not be loaded as {network_class.__name__}: {first_line(error)}. Give its folder or a Hub id that "
            "can be downloaded."
        ) from error
