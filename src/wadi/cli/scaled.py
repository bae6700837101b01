"""Read ``FILE:SCALE``, the form in which ``wadi generate`` takes adapters and LoRAs."""

from __future__ import annotations

from typing import Any

from wadi.errors import WadiError, short_repr
from wadi.io.bounds import ADAPTER_SCALE
from wadi.io.regular import exists


def split_scale(option: str, text: str) -> tuple[str, str | None]:
    """Return the file and the scale of ``FILE:SCALE``; None if the text has no scale.

    The text of an existing file or folder has none, so names with a colon still work. Nor has one whose last colon is before a
    separator, such as that of a Windows drive.

    Args:
        option: name of the option, for messages.
    Raises:
        WadiError: if the scale is not a number, or out of bounds.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or not file or any(mark in scale for mark in "/\\") or exists(text):
        return text, None
    try:
        float(scale)
    except ValueError:
        if not exists(file):
            return text, None  # the error that it does not exist then has the whole name
    if not ADAPTER_SCALE.accepts(scale):
        raise WadiError(f"--{option} {short_repr(text)} has the scale {short_repr(scale)}. It must be a {ADAPTER_SCALE!r}.")
    return file, scale


def split_scales(options: Any) -> None:
    """Separate the scales from the files of ``--adapter`` and ``--lora``, in place.

    ``options.adapter`` becomes a folder, or ``{folder: scale}`` if there are several or one has a scale. The scales of LoRAs
    move to ``options.lora_scale``.

    Raises:
        WadiError: if a scale is not a number, out of bounds or given in two ways, or an adapter is given twice.
    """
    if options.adapter is not None:
        pairs = [split_scale("adapter", text) for text in options.adapter]
        scales = {folder: float(scale or 1) for folder, scale in pairs}
        if len(scales) < len(pairs):
            names = [folder for folder, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WadiError(f"--adapter {twice!r} was given twice. Give each adapter once: its scales would add up.")
        options.adapter = pairs[0][0] if pairs == [(pairs[0][0], None)] else scales
    if options.lora is not None:
        pairs = [split_scale("lora", text) for text in options.lora]
        if any(scale is not None for _, scale in pairs):
            if options.lora_scale is not None:
                raise WadiError(
                    f"--lora {options.lora[0]!r} and --lora-scale {options.lora_scale[0]} were given. Give scales in one "
                    "of the two ways: --lora FILE:SCALE, or --lora-scale once for each --lora."
                )
            options.lora_scale = [scale or "1" for _, scale in pairs]
        options.lora = [file for file, _ in pairs]
