"""Edges of images: Canny's edge map, a differentiable one, and scribbles, with torch alone.

Images are ``(B, 3, H, W)`` in ``[0, 1]``. The gradient is scaled so that a step from black to white has length 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.extras.control.condition_images import as_rgb, to_image, to_tensor

LOW, HIGH = 0.1, 0.2  # Canny's thresholds on the length of the gradient
SIGMA = 0.8  # standard deviation of the blur before the gradient, in pixels
SCRIBBLE_SIGMA, SCRIBBLE_WIDTH = 2.5, 5  # pixels


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images ``(B, C, H, W)`` with a Gaussian of ``sigma`` pixels; beyond the border the border's values repeat."""
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
    """Return Sobel's gradient ``(d/dx, d/dy)``, each ``(B, 1, H, W)``, of the channel in which it is longest.

    A grey image would lose edges: red next to green of the same brightness is an edge.
    """
    channels = images.shape[1]
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device, dtype=images.dtype) / 4
    padded = F.pad(blur(images, sigma), (1,) * 4, mode="replicate")
    dx = F.conv2d(padded, sobel.expand(channels, 1, 3, 3), groups=channels)
    dy = F.conv2d(padded, sobel.T.expand(channels, 1, 3, 3), groups=channels)
    longest = (dx**2 + dy**2).argmax(1, keepdim=True)
    return dx.gather(1, longest), dy.gather(1, longest)


def soft_edges(images: Tensor, softness: float = 0.15, sigma: float = SIGMA) -> Tensor:
    """Return a differentiable edge map ``(B, 1, H, W)``: ``m^2 / (m^2 + softness^2)`` with ``m`` the gradient's length."""
    dx, dy = gradient(images, sigma)
    squared = dx**2 + dy**2
    return squared / (squared + softness**2)


@torch.no_grad()
def edge_map(images: Tensor, low: float = LOW, high: float = HIGH, sigma: float = SIGMA) -> Tensor:
    """Return Canny's edges (1986) as booleans ``(B, 1, H, W)``.

    An edge pixel is a crest of the gradient above ``low`` that is connected to a crest above ``high``.

    Raises:
        WadiError: unless ``0 < low <= high``.
    """
    if not 0 < low <= high:
        raise WadiError(f"Canny's thresholds are low {low} and high {high}. They must satisfy 0 < low <= high.")
    dx, dy = gradient(images, sigma)
    length = torch.hypot(dx, dy)
    crest = length * _is_crest(dx, dy, length)
    weak, edges = crest > low, crest > high
    while True:  # strong edges grow along weak ones until nothing changes
        grown = thicken(edges, 1) & weak
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _is_crest(dx: Tensor, dy: Tensor, length: Tensor) -> Tensor:
    """Return where ``length`` has a maximum across the edge, whose direction is rounded to 45 degrees."""
    height, width = length.shape[-2:]
    padded = F.pad(length, (1,) * 4)
    sector = (torch.atan2(dy, dx) / (torch.pi / 4)).round().long() % 4
    crest = torch.zeros_like(length, dtype=torch.bool)
    for i, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[..., 1 - y : 1 - y + height, 1 - x : 1 - x + width]
        # ">" on one side only, so that of two equal neighbours one is the edge
        crest |= (sector == i) & (length > behind) & (length >= ahead)
    return crest


def thicken(mask: Tensor, radius: int) -> Tensor:
    """Grow booleans ``(B, 1, H, W)`` by ``radius`` pixels in every direction (a square)."""
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0


def canny(image: Image.Image, low: float = LOW, high: float = HIGH, sigma: float = SIGMA) -> Image.Image:
    """Return Canny's edges of an image, white on black."""
    return to_image(edge_map(to_tensor(as_rgb(image)), low, high, sigma)[0])


def scribble(image: Image.Image) -> Image.Image:
    """Return thick coarse lines, white on black: edges of the blurred image, five pixels wide.

    They replace the learned sketches (HED, PiDiNet) that scribble ControlNets were trained on.
    """
    edges = edge_map(to_tensor(as_rgb(image)), LOW / 2, HIGH / 2, SCRIBBLE_SIGMA)
    return to_image(thicken(edges, SCRIBBLE_WIDTH // 2)[0])
