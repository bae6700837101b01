"""Tensors of files that people bring: read whole, checked where they are read, never unpickled."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from wadi.errors import WadiError
from wadi.io.regular import regular

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
UNPICKLE = (
    "Files like this are pickles, which can run code when they are read, and are never loaded. Where you trust the file, "
    "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)."
)
NAMED = 3  # tensors that a message names


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header of a safetensors file.

    Args:
        what: names the file in errors ("LoRA", "Token").
    Raises:
        WadiError: if the file does not exist, is a pickle or of another format, is damaged, or has NaN or infinite values.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise WadiError(f"{what} {str(path)!r} does not exist or is not a regular file. Give a .safetensors file.")
    if path.suffix.lower() in PICKLES:
        raise WadiError(f"{what} {str(path)!r} is not a .safetensors file. {UNPICKLE}")
    try:
        with safe_open(regular(path), framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WadiError(
            f"{what} {str(path)!r} is damaged or not a safetensors file: {str(error).splitlines()[0]}. Save it again."
        ) from error
    refuse_not_finite(f"{what} {str(path)!r}", tensors)
    return tensors, header


def refuse_not_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WadiError` that names the tensors with NaN or infinite values, if there are any."""
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not bool(tensor.float().isfinite().all())
    ]
    if broken:
        raise WadiError(
            f"{what} has NaN or infinite values in {len(broken)} tensors: {listed(broken)}. The file is damaged, or the "
            "training that wrote it diverged. Use another one."
        )


def listed(names: Collection[str]) -> str:
    """Return the first names in order, and how many more there are."""
    first = sorted(names)[:NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off diffusers' remarks on parts of a LoRA that it does not know: what does not fit is refused here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
