"""Convolution dispersion: a larger kernel that covers twice the area without holes (ScaleCrafter, arXiv 2310.07702).

A dispersed kernel ``k'`` of ``K x K`` replaces a kernel ``k`` of ``k x k`` on features ``h`` enlarged ``scale``-fold:

    interp(f_k(h)) = f_k'(interp(h))     structure: on enlarged features the new layer gives the enlarged output of the old one
    f_k(h)         = f_k'(h)             pixels: on features of the old size it gives the same output; weight ``eta``

No ``k'`` satisfies both for all ``h``. Both sides are linear in ``h`` and in the kernels, so the least-squares solution is a
matrix that is computed once: ``k' = R k`` with ``R (K^2, k^2)``. Translating ``h`` by one translates its enlargement by
``scale``, so one impulse in the middle of a field without borders is enough to determine it for all ``h``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi.errors import WadiError

SCALE = 2
ETA = 0.05


@lru_cache
def dispersion_matrix(small: int = 3, large: int = 5, scale: int = SCALE, eta: float = ETA) -> Tensor:
    """Return ``R (large^2, small^2)`` in float64: ``k' = R k`` with kernels as columns of pixels.

    Raises:
        WadiError: if a kernel has an even side, or the large one is not larger.
    """
    if small % 2 == 0 or large % 2 == 0 or large <= small or scale < 2:
        raise WadiError(
            f"Received kernels of {small} and {large} and a scale of {scale}. Sides must be odd, the second one larger, and "
            "the scale a whole number of at least 2."
        )
    side = 2 * (small + large) + 1  # the response to the impulse does not reach the border
    impulse = torch.zeros(1, 1, side, side, dtype=torch.float64)
    impulse[..., side // 2, side // 2] = 1
    structure = _responses(_enlarge(impulse, scale), large), _enlarge(_unflatten(_responses(impulse, small), side), scale)
    pixels = _responses(impulse, large), _responses(impulse, small)
    left = torch.cat([structure[0], eta * pixels[0]], 1)
    right = torch.cat([structure[1].flatten(1), eta * pixels[1]], 1)
    return torch.linalg.lstsq(left.T, right.T).solution


def disperse(weight: Tensor, R: Tensor) -> Tensor:
    """Return kernels ``(out, in, k, k)`` as dispersed ones ``(out, in, K, K)``, in the dtype of ``weight``."""
    side = round(len(R) ** 0.5)
    enlarged = torch.einsum("mn,oin->oim", R.to(weight.device, torch.float32), weight.flatten(2).float())
    return enlarged.unflatten(2, (side, side)).to(weight.dtype)


def _responses(field: Tensor, kernel: int) -> Tensor:
    """Return ``(kernel^2, pixels)``: the convolution of ``field`` with each one-pixel kernel of ``kernel x kernel``."""
    basis = torch.eye(kernel**2, dtype=field.dtype).view(-1, 1, kernel, kernel)
    return F.conv2d(field, basis, padding=kernel // 2)[0].flatten(1)


def _unflatten(rows: Tensor, side: int) -> Tensor:
    return rows.view(-1, 1, side, side)


def _enlarge(field: Tensor, scale: int) -> Tensor:
    return F.interpolate(field, scale_factor=scale, mode="bilinear")
