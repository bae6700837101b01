"""Whatever a library raises while a pipeline is loaded, as one line that says what failed and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from wadi.errors import WadiError
from wadi.io.regular import exists
from wadi.io.weights import opened, quiet
from wadi.parallel.device import out_of_memory


@contextmanager
def loading(
    path: object,
    part: str = "",
    files: Sequence[Path] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Iterator[None]:
    """Turn what a library raises within the block into one `WadiError` about the pipeline ``path``.

    Args:
        part: what of it is loaded, such as ``"unet/config.json"``.
        files, dtype, device: safetensors files, and how they are loaded, for the message when memory runs out.
    """
    try:
        with quiet():
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
            f"{subject} could not be loaded. The Hub could not deliver it: {first_line(error)}. Check the id, the network and, "
            "for a gated model, `hf auth login`; or give a local folder."
        ) from error


@contextmanager
def moving(path: object, files: Sequence[Path], dtype: torch.dtype, device: str | torch.device) -> Iterator[None]:
    """Raise `WadiError` if memory runs out within the block, which moves the pipeline ``path`` to ``device``.

    Anything else passes through: a driver that fails says nothing about the files.

    Args:
        files, dtype, device: see `loading`.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise WadiError(_too_large(path, files, dtype, device)) from error
        raise


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn what a library raises within the block, while models of files compute, into one `WadiError`.

    Many values of a config are first used there. Running out of memory passes through.

    Args:
        what: what could not be done, as ``"Pipeline X cannot generate"``.
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
    """Return the bytes that the floating-point tensors of safetensors files need in ``dtype``, by their headers."""
    values = 0
    for file in files:
        with opened(file) as stored:
            values += sum(_count(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    return values * dtype.itemsize


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _too_large(path: object, files: Sequence[Path], dtype: torch.dtype, device: str | torch.device) -> str:
    needed = bytes_in(files, dtype) if files else 0
    name = str(dtype).removeprefix("torch.")
    size = f" Its weights take {needed / 2**30:.1f} GiB in {name}." if needed else ""
    half = f" in bfloat16 ({needed / dtype.itemsize * 2 / 2**30:.1f} GiB)" if needed and dtype.itemsize > 2 else ""
    return (
        f"Memory on {device} ran out while the teacher {str(path)!r} was loaded.{size} Load it{half or ' where more is free'}: "
        "see --dtype and --device; `wadi plan --teacher` prints what training needs."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters, without the final stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
