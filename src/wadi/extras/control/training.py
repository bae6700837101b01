"""Train a ControlNet on edges, for a teacher or for a one-step student.

The folder of a training holds the teacher's images (``pictures.safetensors``), the checkpoint (``training.safetensors``) and
the result (``controlnet``). `losses` has the formulas, `loop` the loop.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi.backbones import Backbone, from_pipeline
from wadi.backbones.digest import loaded_digest, tensors_digest
from wadi.diffusion.schedulers import only_timestep_of
from wadi.distill.state import fingerprint
from wadi.errors import WadiError
from wadi.extras.control.config import ControlConfig
from wadi.extras.control.data import (
    TrainingImages,
    generate_images,
    load_images,
    save_images,
    shuffled_prompts,
)
from wadi.extras.control.fit import check_control_fits
from wadi.extras.control.loop import ControlTraining
from wadi.extras.control.network import controlnet_of
from wadi.io.files import whole_folder
from wadi.io.records import parse_json
from wadi.io.tensors import read_with_metadata
from wadi.sampling import check_steps

IMAGE_SEED = 1_000_000  # of the first training image: far from the small seeds that people and tests use


def train_control(config: ControlConfig, teacher: Any, prompts: Sequence[str], student: Any = None, start: Any = None) -> Path:
    """Train a ControlNet on edges, and return its folder ``OUT/controlnet``, which diffusers loads.

    Args:
        teacher: pipeline that generates the training images. Without a student, the ControlNet steers this pipeline.
        student: one-step pipeline that the ControlNet steers.
        start: ControlNet to continue from; None = a new one, copied from the network.
    Raises:
        WadiError: if the network is not a U-Net, ``start`` does not fit it, or ``OUT`` contains a training with other settings.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
    """
    generator = from_pipeline(teacher)
    backbone = generator if student is None else from_pipeline(student)
    if backbone.component != "unet":
        raise WadiError(
            f"The teacher is a {type(teacher).__name__}. A ControlNet can be trained for U-Nets (SD, SDXL): choose such a "
            "teacher."
        )
    check_steps(generator, config.picture_steps, "picture_steps")
    out = Path(config.out)
    result, checkpoint = out / "controlnet", out / "training.safetensors"
    if result.exists() and not checkpoint.is_file():
        raise _foreign_result(result)
    controlnet = start if start is not None else _new_controlnet(config, backbone)
    check_control_fits(teacher if student is None else student, controlnet)
    timestep = None if student is None else only_timestep_of(student.scheduler, "Training a ControlNet")
    note = dataclasses.asdict(config) | {"out": "", "save_every": 0, "network": fingerprint(backbone.network)}
    note |= {
        "teacher": loaded_digest(teacher),
        "student": None if student is None else tensors_digest(backbone.network.state_dict()),
        "timestep": timestep,
        "start": None if start is None else tensors_digest(start.state_dict()),
    }
    check_same_training(checkpoint, note)
    images = _training_images(config, generator, prompts, out / "pictures.safetensors")
    note["images"] = tensors_digest({"latents": images.latents, "edges": images.edges}, json.dumps(images.prompts))
    check_same_training(checkpoint, note)
    training = ControlTraining(config, backbone, timestep, controlnet, images)
    training.resume(checkpoint, json.dumps(note))
    if result.exists():
        if training.step < config.steps or not _contains(result, controlnet):
            raise _foreign_result(result)
        return result
    training.loop()
    with whole_folder(result) as folder:
        copy.deepcopy(controlnet).half().save_pretrained(folder)
    return result


def check_same_training(checkpoint: Path, note: Mapping[str, Any]) -> None:
    """Raise `WadiError`, naming the differences, if a checkpoint belongs to another training than ``note`` describes.

    A checkpoint from before a setting existed agrees with any value of it.
    """
    if not checkpoint.is_file():
        return
    _, metadata = read_with_metadata(checkpoint, "The checkpoint", "Delete it to start the training again.")
    try:
        then = parse_json(metadata["note"], dict[str, Any], "Its note")
        differences = [
            f"{name} {then[name]!r} (now {now!r})" for name, now in note.items() if name in then and then[name] != now
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WadiError(f"{str(checkpoint)!r} is damaged ({error!r}). Delete it to start the training again.") from error
    if differences:
        raise WadiError(
            f"{str(checkpoint.parent)!r} contains a training with other settings: {', '.join(differences)}. Restore them to "
            "continue it, or choose another --out."
        )


def _foreign_result(result: Path) -> WadiError:
    return WadiError(
        f"{str(result)!r} exists and is not the result of this training, which would replace it. Move it elsewhere, or choose "
        "another --out."
    )


def _contains(folder: Path, controlnet: nn.Module) -> bool:
    """Return whether ``folder`` holds the weights of ``controlnet`` in half precision, as `train_control` writes them."""
    file = folder / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        return False
    tensors, _ = read_with_metadata(file, "The ControlNet", "Delete it to write it again.")
    weights = controlnet.state_dict()
    return tensors.keys() == weights.keys() and all(torch.equal(tensors[k], v.half().cpu()) for k, v in weights.items())


def _new_controlnet(config: ControlConfig, backbone: Backbone) -> Any:
    torch.manual_seed(config.seed)
    return controlnet_of(backbone.network, backbone.scale, config.slim).to(backbone.device)


def _training_images(config: ControlConfig, generator: Backbone, prompts: Sequence[str], path: Path) -> TrainingImages:
    """Return the images stored at ``path``; generate and store them if the file does not exist."""
    names = ("pictures", "picture_steps", "guidance_scale", "seed")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"teacher": fingerprint(generator.network), "prompts": len(prompts)}
    chosen = shuffled_prompts(prompts, config.pictures, config.seed)
    earlier = json.dumps(settings)  # earlier versions stored no digest
    note = json.dumps(settings | {"digest": loaded_digest(generator.pipeline)})
    images = load_images(path, (note, earlier), chosen)
    if images is None:
        images = generate_images(generator, chosen, IMAGE_SEED + config.seed, config.picture_steps, config.guidance_scale)
        save_images(path, images, note)
    return images
