"""Check weights where they are read: every tensor is in the files, and every value is finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.io.regular import regular

NAMED = 3  # tensors that a message names


def load_complete(model_class: Any, source: object, what: str, **options: Any) -> Any:
    """Return ``model_class.from_pretrained(source, **options)`` ; every tensor is read from the files.

    Both libraries fill tensors that the files lack (at random, or not at all) and only log a remark.

    Args:
        model_class: a model class of diffusers or transformers.
        source: folder or Hub id.
        what: name of the model in error messages, such as ``"Text encoder 'folder'"``.
    Raises:
        WadiError: if tensors are missing or a value is NaN or infinite; the message names the tensors. Whatever the library
            raises passes through.
    """
    with quiet():
        model, info = model_class.from_pretrained(source, output_loading_info=True, **options)
    refuse_missing(what, info["missing_keys"], info["unexpected_keys"])
    refuse_not_finite(what, stored_tensors(model))
    return model


def refuse_missing(what: str, missing: Collection[str], unexpected: Collection[str] = ()) -> None:
    """Raise `WadiError` that names the ``missing`` tensors, if there are any; ``unexpected`` ones may explain why."""
    if not missing:
        return
    if any(".base_layer." in name for name in unexpected):
        why = (
            "It was saved with an adapter attached, which renames the layers. Merge the adapter first "
            "(pipeline.fuse_lora() and pipeline.unload_lora_weights()), then save the pipeline again."
        )
    else:
        why = "Its files are incomplete. Download or save them again."
    raise WadiError(f"{what} lacks {len(missing)} tensors: {listed(missing)}. {why}")


def refuse_not_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WadiError` that names the tensors with NaN or infinite values, if there are any."""
    if broken := not_finite(tensors):
        half = any(tensors[name].dtype == torch.float16 for name in broken)
        raise WadiError(
            f"{what} has NaN or infinite values in {len(broken)} tensors: {listed(broken)}. The file is damaged, or the "
            "training that wrote it diverged"
            + (", or a value is too large for float16. Use bfloat16 or float32, or other weights." if half else ". Use others.")
        )


def refuse_not_floats(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WadiError` that names the tensors whose numbers are integers, booleans or complex, if there are any."""
    if broken := [name for name, value in tensors.items() if not value.is_floating_point()]:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in broken}))
        raise WadiError(
            f"{what} has {len(broken)} tensors of type {kinds}: {listed(broken)}. Floating-point numbers are needed: save the "
            "file as float32, bfloat16 or float16."
        )


def refuse_whole_weights(what: str, stored: Any) -> None:
    """Raise `WadiError` if weights or biases in an `opened` file are not floating-point numbers; libraries would cast them."""
    names = [name for name in stored.keys() if name.endswith((".weight", ".bias"))]  # noqa: SIM118
    kinds = {name: stored.get_slice(name).get_dtype() for name in names}
    if broken := [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
        raise WadiError(
            f"{what} has {len(broken)} weights of type {', '.join(sorted({kinds[name] for name in broken}))}: {listed(broken)}."
            " Floating-point numbers are needed: download or save the files again."
        )


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors with a NaN or infinite value. Reads each once, and waits for a GPU once."""
    extremes: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            # The minimum and maximum show NaN and infinity without a mask as large as the tensor.
            least, most = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.detach().float())
            extremes.setdefault(tensor.device, {})[name] = torch.stack([least, most]).float()
    broken = set()
    for found in extremes.values():
        finite = torch.stack(list(found.values())).isfinite().all(1).tolist()
        broken |= {name for name, fine in zip(found, finite, strict=True) if not fine}
    return [name for name in tensors if name in broken]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that files hold: parameters and persistent buffers."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def listed(names: Collection[str]) -> str:
    """Return the first names in order, and how many more there are."""
    first = sorted(names)[:NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and remarks of diffusers and transformers within the block; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            (library.enable_progress_bar if bars else library.disable_progress_bar)()


def opened(file: Path, what: str = "Weights") -> Any:
    """Open a safetensors file for reading tensors one at a time.

    Args:
        what: names the file in errors, with a capital letter.
    Raises:
        WadiError: if it is not a regular file, is damaged, or is of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(regular(file, what=what), framework="pt")  # it would wait for ever on a named pipe
    except (OSError, SafetensorError) as error:
        raise WadiError(
            f"{what} {str(file)!r} is damaged or cannot be read: {str(error).splitlines()[0]}. A safetensors file is needed."
        ) from error
