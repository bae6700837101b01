"""NaN and infinity are an error at the autoencoder, both ways: as pixels they would be black or white without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError


def check(values: Tensor, part: str = "decoder") -> Tensor:
    """Return ``values`` ``(B, ...)``, one row for each image, unchanged.

    Args:
        part: of the autoencoder that they come from, "decoder" or "encoder".
    Raises:
        WadiError: if one of them contains NaN or infinity.
    """
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise WadiError(
            f"The autoencoder's {part} returned NaN or infinity for {bad} of {len(values)} images, in {str(values.dtype)[6:]}. "
            "Use another dtype (bfloat16 or float32) if it is float16, which overflows; otherwise check the weights: adapter, "
            "LoRA, token, control and autoencoder."
        )
    return values


@contextmanager
def finite_decoding(vae: Any) -> Iterator[None]:
    """Within the block ``vae.decode`` raises as `check`, also when a pipeline calls it.

    An attribute of the object hides the method of its class; what was there before is there again afterwards.
    """
    inner, own = vae.decode, vars(vae).get("decode")

    def decode(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        first = output[0]
        if isinstance(first, Tensor) and torch.is_floating_point(first):
            check(first)
        return output

    vae.decode = decode
    try:
        yield
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own
