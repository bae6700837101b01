"""Check the options of ``wadi generate`` before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.generate_options import strength_from
from wadi.cli.parser import flag
from wadi.errors import WadiError
from wadi.io.outputs import check_writable

if TYPE_CHECKING:
    import torch

NEEDED = (  # (option, the option without which it has no effect)
    ("strength", "init"), ("redilate", "size"), ("redilate_blocks", "size"), ("disperse", "size"),
    ("lora_scale", "lora"), ("condition", "control"), ("condition_from", "control"), ("control_scale", "control"),
    ("control", "condition"), ("control_mode", "control"), ("image_encoder", "control"), ("token_name", "token"),
    ("teacher_steps", "compare"), ("guidance_scale", "compare"), ("overwrite", "prompts"),
)  # fmt: skip
PAIRED = (  # (option, the option that must be given as often)
    ("lora_scale", "lora"), ("token_name", "token"), ("condition", "control"), ("condition_from", "control"),
    ("control_scale", "control"), ("control_mode", "control"),
)  # fmt: skip


def check_conflicts(options: Any) -> None:
    """Raise `WadiError` for options that do not go together."""
    from wadi.extras.steps import check_steps_and_strength

    _check_companions(options)
    _check_source(options)
    if options.compare:
        if options.overwrite:
            raise WadiError("--compare and --overwrite were given. Leave out --overwrite: --compare always replaces its image.")
        for option in ("init", "size", "control"):
            if getattr(options, option) is not None:
                raise WadiError(f"--compare and --{option} were given. Give one of them: the teacher here has no such option.")
    check_steps_and_strength(options.steps or 1, strength_from(options))


def _check_companions(options: Any) -> None:
    for option, needed in NEEDED:
        if _given(options, option) and not _given(options, needed):
            raise WadiError(f"{flag(option)} was given without {flag(needed)}. Give both or neither.")
    for option, partner in PAIRED:
        values, partners = getattr(options, option), getattr(options, partner)
        if values is not None and len(values) != len(partners):
            raise WadiError(
                f"{flag(option)} was given {len(values)} times and {flag(partner)} {len(partners)} times. Give {flag(option)} "
                f"once for each {flag(partner)}, in the same order."
            )


def _check_source(options: Any) -> None:
    from wadi.pipelines.load import is_export

    if options.run is None:
        return
    if options.adapter is not None:
        raise WadiError(f"--run {options.run!r} and --adapter {options.adapter!r} were given. Give one of them.")
    if is_export(options.run):
        for option in ("teacher", "compare"):
            if _given(options, option):
                raise WadiError(
                    f"--{option} was given, but --run {options.run!r} is an exported pipeline: its weights are complete, and "
                    f"it has no teacher. Leave out --{option}, or give the folder of the run, or --adapter."
                )


def _given(options: Any, name: str) -> bool:
    return getattr(options, name) not in (None, False)


def check_output(options: Any, out: Path, in_folder: bool) -> None:
    """Raise `WadiError` if ``out`` cannot be written, or is an image that another option reads."""
    check_writable(out, () if in_folder else (".png",), in_folder)
    if in_folder or not out.exists():
        return
    for option in ("init", "condition"):
        sources = getattr(options, option) or []
        for source in [sources] if isinstance(sources, str) else sources:
            if Path(source).exists() and out.samefile(source):
                raise WadiError(f"--out {str(out)!r} would replace the image that --{option} reads. Choose another name.")


def check_memory(size: tuple[int, int], batch: int, device: torch.device) -> None:
    """Raise `WadiError` if the decoded images of one batch do not fit in memory.

    A decoded image takes 24 bytes a pixel (float32, twice) and 3 as pixels; the network needs more.
    """
    from wadi.parallel.device import free_memory

    each, free = size[0] * size[1] * 27, free_memory(device)
    if batch * each > free:
        hint = f"--batch {max(1, free // each)}" if each <= free else "a smaller --size"
        raise WadiError(
            f"{batch} image(s) of {size[1]}x{size[0]} take at least {batch * each:,} bytes, and {free:,} are free. Use {hint}."
        )
