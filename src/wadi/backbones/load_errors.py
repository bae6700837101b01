"""Turn the errors that libraries raise while a pipeline is loaded or runs into one line: what failed, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from wadi.errors import WadiError, first_line
from wadi.io.quiet import errors_only
from wadi.io.regular import exists
from wadi.io.tensors import open_tensors
from wadi.parallel.device import out_of_memory


@contextmanager
def explain_load_errors(
    path: object,
    part: str = "",
    files: Sequence[Path] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Iterator[None]:
    """Turn any error within the block into a `WadiError` about the pipeline ``path``. Library messages are turned off.

    Args:
        part: the part of the pipeline that is loaded, such as ``"unet/config.json"``.
        files, dtype, device: safetensors files, and how they are loaded, for the message when memory runs out.
    """
    try:
        with errors_only():
            yield
    except WadiError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise WadiError(_too_large(path, files, dtype, device)) from error
        subject = f"{part} of the teacher {str(path)!r}" if part else f"Teacher {str(path)!r}"
        if exists(str(path)):
            raise WadiError(
                f"{subject} could not be loaded: {first_line(error)}. Its files are damaged or incomplete: download or save it "
                "again with save_pretrained()."
            ) from error
        raise WadiError(
            f"{subject} could not be downloaded from the Hub: {first_line(error)}. Check the id, the network and, for a gated "
            "model, `hf auth login`; or give a local folder."
        ) from error


@contextmanager
def explain_move_errors(path: object, files: Sequence[Path], dtype: torch.dtype, device: str | torch.device) -> Iterator[None]:
    """Raise `WadiError` if memory runs out within the block, which moves the pipeline ``path`` to ``device``.

    Other errors pass through: a failing driver has nothing to do with the files.

    Args:
        files, dtype, device: see `explain_load_errors`.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise WadiError(_too_large(path, files, dtype, device)) from error
        raise


@contextmanager
def explain_run_errors(what: str) -> Iterator[None]:
    """Turn errors within the block, in which loaded models compute, into a `WadiError`.

    Many values of a config are first used there. Running out of memory passes through.

    Args:
        what: what could not be done, such as ``"Pipeline X cannot generate"``.
    """
    try:
        yield
    except WadiError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise WadiError(
            f"{what}: {type(error).__name__}: {first_line(error)}. A value in a config of the pipeline, or of an adapter or "
            "control on it, does not fit its weights or its class: restore the files. --debug shows where it failed."
        ) from error


def bytes_in(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Return the bytes that the tensors of safetensors files need in ``dtype``, from the headers of the files."""
    values = 0
    for file in files:
        with open_tensors(file) as stored:
            values += sum(torch.Size(stored.get_slice(name).get_shape()).numel() for name in stored.keys())  # noqa: SIM118
    return values * dtype.itemsize


def _too_large(path: object, files: Sequence[Path], dtype: torch.dtype, device: str | torch.device) -> str:
    needed = bytes_in(files, dtype) if files else 0
    name = str(dtype).removeprefix("torch.")
    size = f" Its weights take {needed / 2**30:.1f} GiB in {name}." if needed else ""
    half = f" in bfloat16 ({needed / dtype.itemsize * 2 / 2**30:.1f} GiB)" if needed and dtype.itemsize > 2 else ""
    return (
        f"Memory on {device} ran out while the teacher {str(path)!r} was loaded.{size} Load it{half or ' where more is free'}: "
        "see --dtype and --device; `wadi plan --teacher` prints how much memory training needs."
    )
