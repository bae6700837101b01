"""Check weights when they are read: all tensors are there, with the right shapes, and every value is a finite float.

diffusers, transformers and PEFT only log a message in most of these cases, and fill missing tensors with random values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.io.quiet import errors_only

SHOWN_NAMES = 3  # how many tensor names a message lists


def load_complete(model_class: Any, source: object, what: str, **options: Any) -> Any:
    """Return ``model_class.from_pretrained(source, **options)``, and check that every tensor came from the files.

    Args:
        model_class: a model class of diffusers or transformers.
        source: folder or Hub id.
        what: name of the model in error messages, such as ``"Text encoder 'folder'"``.
    Raises:
        WadiError: if tensors are missing, or a value is NaN or infinite. The message names the tensors. Errors of the library
            pass through.
    """
    with errors_only():
        model, info = model_class.from_pretrained(source, output_loading_info=True, **options)
    check_none_missing(what, info["missing_keys"], info["unexpected_keys"])
    check_finite(what, saved_tensors(model))
    return model


def check_none_missing(what: str, missing: Collection[str], unexpected: Collection[str] = ()) -> None:
    """Raise `WadiError` if there are ``missing`` tensors. ``unexpected`` tensors may explain why."""
    if not missing:
        return
    if any(".base_layer." in name for name in unexpected):
        why = (
            "It was saved with an adapter attached, which renames the layers. Merge the adapter first "
            "(pipeline.fuse_lora() and pipeline.unload_lora_weights()), then save the pipeline again."
        )
    else:
        why = "Its files are incomplete. Download or save them again."
    raise WadiError(f"{what} lacks {len(missing)} tensors: {first_names(missing)}. {why}")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def tensor_differences(
    expected: Mapping[str, Sequence[int]], received: Mapping[str, Sequence[int]], shown_prefix: str = ""
) -> str:
    """Compare two sets of tensors by name and shape.

    Args:
        expected, received: shapes by name.
        shown_prefix: left out of the names in the text.
    Returns:
        The missing, unknown and reshaped tensors in one phrase, such as ``"2 missing (first: a), 1 of another shape
        (first: b)"``; empty if there are none.
    """
    groups = {
        "missing": expected.keys() - received.keys(),
        "unknown": received.keys() - expected.keys(),
        "of another shape": {
            name for name in expected.keys() & received.keys() if tuple(expected[name]) != tuple(received[name])
        },
    }
    return name_groups(groups, shown_prefix)


def name_groups(groups: Mapping[str, Collection[str]], shown_prefix: str = "") -> str:
    """Return how many names each group has, and the first name of each; empty groups are left out.

    Args:
        groups: names by description, such as ``{"missing": ["a", "b"]}``.
        shown_prefix: left out of the names in the text.
    """
    return ", ".join(
        f"{len(names)} {description} (first: {min(names).removeprefix(shown_prefix)})"
        for description, names in groups.items()
        if names
    )


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WadiError` that names the tensors with NaN or infinite values, if there are any."""
    if broken := non_finite_names(tensors):
        half = any(tensors[name].dtype == torch.float16 for name in broken)
        raise WadiError(
            f"{what} has NaN or infinite values in {len(broken)} tensors: {first_names(broken)}. The file is damaged, or the "
            "training that wrote it diverged"
            + (", or a value is too large for float16. Use bfloat16 or float32, or other weights." if half else ". Use others.")
        )


def check_floats(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WadiError` that names the tensors of integers, booleans or complex numbers, if there are any."""
    if broken := [name for name, value in tensors.items() if not value.is_floating_point()]:
        dtypes = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in broken}))
        raise WadiError(
            f"{what} has {len(broken)} tensors of type {dtypes}: {first_names(broken)}. Floating-point numbers are needed: "
            "save the file as float32, bfloat16 or float16."
        )


def check_stored_floats(what: str, stored: Any) -> None:
    """Raise `WadiError` if weights or biases in an opened safetensors file are not floats. Libraries would cast them."""
    names = [name for name in stored.keys() if name.endswith((".weight", ".bias"))]  # noqa: SIM118
    dtypes = {name: stored.get_slice(name).get_dtype() for name in names}
    if broken := [name for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]:
        raise WadiError(
            f"{what} has {len(broken)} weights of type {', '.join(sorted({dtypes[name] for name in broken}))}: "
            f"{first_names(broken)}. Floating-point numbers are needed: download or save the files again."
        )


@torch.no_grad()
def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors with a NaN or infinite value.

    Reads each tensor once, and waits for each GPU once.
    """
    extremes: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            # NaN and infinity show in the minimum and maximum; a mask would be as large as the tensor.
            least, most = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.detach().float())
            extremes.setdefault(tensor.device, {})[name] = torch.stack([least, most]).float()
    broken = set()
    for by_name in extremes.values():
        finite = torch.stack(list(by_name.values())).isfinite().all(1).tolist()
        broken |= {name for name, is_finite in zip(by_name, finite, strict=True) if not is_finite}
    return [name for name in tensors if name in broken]


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a model saves to files: parameters and persistent buffers."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def first_names(names: Collection[str]) -> str:
    """Return the first names in alphabetical order, and how many more there are: ``"a, b, c and 4 more"``."""
    first = sorted(names)[:SHOWN_NAMES]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
