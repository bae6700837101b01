"""Tensors of files that people bring: read whole, checked where they are read, never unpickled."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from wadi.errors import WadiError
from wadi.io.regular import regular
from wadi.io.weights import opened, refuse_not_finite, refuse_not_floats

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
UNPICKLE = (
    "Files like this are pickles, which can run code when they are read, and are never loaded. Where you trust the file, "
    "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)."
)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header of a safetensors file.

    Args:
        what: names the file in errors ("LoRA", "Token").
    Raises:
        WadiError: if the file does not exist, is a pickle or of another format, is damaged, or has NaN or infinite
            values, or tensors of whole numbers.
    """
    regular(path, what=what)
    if path.suffix.lower() in PICKLES:
        raise WadiError(f"{what} {str(path)!r} is not a .safetensors file. {UNPICKLE}")
    with opened(path, what) as stored:
        header = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    matrices = {name: value for name, value in tensors.items() if value.ndim}  # single numbers, such as alphas, may be whole
    refuse_not_floats(f"{what} {str(path)!r}", matrices)
    refuse_not_finite(f"{what} {str(path)!r}", tensors)
    return tensors, header
