"""A merged pipeline that diffusers loads without this package, with the student's scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wadi.backbones.saving import loading_line, write_pipeline
from wadi.exports.source import Source, plain_call
from wadi.exports.written import Written
from wadi.io.wording import counted


def write(source: Source, folder: Path, settings: Any) -> Written:
    """Write the pipeline into ``folder``."""
    pipeline = source.pipeline()
    call, steps = plain_call(pipeline)
    reference = source.draw(pipeline, call, steps)
    write_pipeline(pipeline, folder)
    line = loading_line(pipeline, Path("FOLDER")).replace("'FOLDER'", "FOLDER")
    return Written(
        title=f"A student that generates in {counted(steps, 'step')}",
        reference=reference,
        read=lambda: _read(source, folder, call, steps),
        reader="`DiffusionPipeline.from_pretrained` of diffusers",
        code=_code(line),
        summary=line,
        data={"steps": steps, "call": call, "dtype": str(source.dtype).removeprefix("torch.")},
    )


def _code(line: str) -> str:
    """Return the loading line as a program."""
    torch_import = "import torch\n" if "torch." in line else ""
    return f'{torch_import}from diffusers import DiffusionPipeline\n\nprompt = "..."\nimage = {line}.images[0]\n'


def _read(source: Source, folder: Path, call: dict[str, Any], steps: int) -> list[Image.Image]:
    from diffusers import DiffusionPipeline

    from wadi.io.quiet import errors_only

    with errors_only():
        pipeline = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=source.dtype).to(torch.device(source.device))
    pipeline.set_progress_bar_config(disable=True)
    return source.draw(pipeline, call, steps)
