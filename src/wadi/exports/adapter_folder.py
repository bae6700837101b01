"""The student's adapter as PEFT writes it, with the name of its teacher. LoRaD needs ``import wadi`` before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from wadi import roles
from wadi.backbones import Backbone, from_pipeline, load_pipeline
from wadi.backbones.configs import read_config
from wadi.convert.lora_files import loading_lines
from wadi.diffusion.schedulers import make_scheduler
from wadi.errors import WadiError
from wadi.exports.source import Source, plain_call
from wadi.exports.written import Written
from wadi.io.wording import counted


def write(source: Source, folder: Path, settings: Any) -> Written:
    """Write the adapter into ``folder``.

    Raises:
        WadiError: if the student is a merged pipeline.
    """
    if source.is_merged:
        raise WadiError(
            f"{source.run!r} is a merged pipeline, which has no adapter. Give the run, make an adapter with `wadi extract`, or "
            "export a LoRA: --to lora --teacher TEACHER."
        )
    backbone, about = source.attached()
    config = backbone.network.peft_config["student"]
    config.base_model_name_or_path, config.inference_mode = source.base_name, True
    roles.write(backbone.network, "student", folder)
    record = {"timesteps": list(about.timesteps), "resolution": list(backbone.resolution), "teacher": source.base_name}
    if about.teacher_digest is not None:
        record["teacher_digest"] = about.teacher_digest
    (folder / "wadi.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    scheduler = backbone.pipeline.scheduler
    scheduler.save_pretrained(folder / "scheduler")
    roles.fuse(backbone.network, "student")
    call, steps = plain_call(backbone.pipeline)
    method = config.peft_type.value
    return Written(
        title=f"{method} adapter of a student that generates in {counted(steps, 'step')}",
        reference=source.draw(backbone.pipeline, call, steps),
        read=lambda: _read(source, folder, call, steps),
        reader="`PeftModel.from_pretrained` of PEFT",
        code=_code(backbone, scheduler, steps),
        summary=f"{method} adapter for {source.base_name}; README.md has the lines that load it",
        data={"steps": steps, "call": call, "adapter": method},
        library="peft",
        tags=(method.lower(),),
    )


def _code(backbone: Backbone, scheduler: Any, steps: int) -> str:
    component = f"pipe.{backbone.component}"
    load = f"PeftModel.from_pretrained({component}, FOLDER)  # puts the adapter on the layers of {component}"
    lines = loading_lines(backbone, scheduler, steps, load)
    return f"import wadi  # registers LoRaD with PEFT\nfrom peft import PeftModel\n{lines}"


def _read(source: Source, folder: Path, call: dict[str, Any], steps: int) -> list[Image.Image]:
    from peft import PeftModel

    pipeline = load_pipeline(source.locate()[1], source.dtype, source.device)
    PeftModel.from_pretrained(from_pipeline(pipeline).network, str(folder))
    pipeline.scheduler = make_scheduler(read_config(folder, "scheduler"))
    return source.draw(pipeline, call, steps)
