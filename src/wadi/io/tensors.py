"""Read tensors from safetensors files, and never from pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.errors import WadiError, first_line
from wadi.io.regular import require_file
from wadi.io.weight_checks import check_finite, check_floats

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE_REMEDY = (
    "Files like this are pickles, which can run code when they are read, and are never loaded. If you trust the file, "
    "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)."
)


def open_tensors(file: Path, what: str = "Weights") -> Any:
    """Open a safetensors file, to read its tensors one at a time.

    Args:
        what: name of the file in errors, with a capital letter.
    Raises:
        WadiError: if it is not a regular file, is damaged, or has another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(require_file(file, what=what), framework="pt")  # safe_open alone would wait for ever on a named pipe
    except (OSError, SafetensorError) as error:
        raise WadiError(
            f"{what} {str(file)!r} is damaged or cannot be read: {first_line(error)}. Give a safetensors file."
        ) from error


def read_with_metadata(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file that this package wrote.

    Args:
        what: name of the file in errors, with a capital letter.
        remedy: what to do if it is damaged; the end of the message.
    Raises:
        WadiError: if the file is damaged, or not a regular file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require_file(path), framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WadiError(f"{what} {str(path)!r} is damaged: {first_line(error)}. {remedy}") from error


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and its header.

    Args:
        what: name of the file in errors ("LoRA", "Token").
    Raises:
        WadiError: if the file does not exist, is a pickle or has another format, is damaged, or has NaN or infinite values,
            or tensors of integers.
    """
    require_file(path, what=what)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WadiError(f"{what} {str(path)!r} is not a .safetensors file. {PICKLE_REMEDY}")
    with open_tensors(path, what) as stored:
        header = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    matrices = {name: value for name, value in tensors.items() if value.ndim}  # single numbers, such as alphas, may be integers
    check_floats(f"{what} {str(path)!r}", matrices)
    check_finite(f"{what} {str(path)!r}", tensors)
    return tensors, header
