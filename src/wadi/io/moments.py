"""An optimiser's moments as named tensors, so that they can be saved in safetensors files.

The tensors of parameter ``i`` are called ``PREFIX i.NAME``, for example ``adam.3.exp_avg``. bitsandbytes stores a quantised
moment as a dictionary of tensors; each is called ``PREFIX i.GROUP/NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def moments_of(optimizer: Optimizer, prefix: str, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return the moments and step counts of ``optimizer``, each under a name that starts with ``prefix`` (``"adam."``).

    Args:
        names: maps the optimiser's names to names in the file. Moments without an entry are left out. None = the
            optimiser's names.
    """
    tensors: dict[str, Tensor] = {}
    for index, moments in optimizer.state_dict()["state"].items():
        saved = moments if names is None else {names[name]: value for name, value in moments.items() if name in names}
        for name, value in saved.items():
            if isinstance(value, dict):  # all parameters share these tables, and tensors in a file may not share memory
                tensors |= {f"{prefix}{index}.{name}/{inner}": tensor.clone() for inner, tensor in value.items()}
            else:
                tensors[f"{prefix}{index}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_moments(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], prefix: str, names: Mapping[str, str] | None = None
) -> None:
    """Put the moments that `moments_of` returned back into ``optimizer``. Tensors with other names are ignored.

    Raises:
        ValueError: if a name does not have the form given above.
    """
    state: dict[int, dict[str, Any]] = {}
    original = None if names is None else {new: old for old, new in names.items()}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".")
            if original is not None:
                if name not in original:
                    continue
                name = original[name]
            moments = state.setdefault(int(index), {})
            *group, name = name.split("/")
            whole_number = not value.ndim and not value.is_floating_point()  # bitsandbytes counts steps in an int
            (moments.setdefault(group[0], {}) if group else moments)[name] = int(value) if whole_number else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
