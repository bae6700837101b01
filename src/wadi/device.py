"""Which device to run on."""

from __future__ import annotations

import torch

from wadi.errors import WadiError


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        WadiError: if the machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WadiError(
            f"Device {name!r} cannot be used: {str(error).splitlines()[0]} Expected cpu, cuda, cuda:1, ..."
        ) from error
    return device
