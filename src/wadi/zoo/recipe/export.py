"""Stage 5 of the recipe: the shipped folders in fp16 safetensors, their measured quality and their card."""

from __future__ import annotations

import copy
import json
import platform
from pathlib import Path
from typing import Any

from wadi.backbones.saving import write_pipeline
from wadi.io.files import whole_folder, write_whole
from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import eval_prompts
from wadi.zoo.recipe.icons import Sprites

CARD = Path(__file__).parent / "card.md"


def export_pipeline(pipe: Any, folder: Path) -> int:
    """Save ``pipe`` in fp16 as a diffusers folder, without changing ``pipe``. Return the number of bytes of its weights."""
    half = copy.deepcopy(pipe)
    for part in (half.vae, half.text_encoder, half.unet):
        part.half()
    with whole_folder(folder) as temporary:
        write_pipeline(half, temporary)
        # transformers 4's CLIPTokenizer reads vocab.json and merges.txt, transformers 5's tokenizer.json.
        half.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def export_student(run: Path, folder: Path) -> Path:
    """Write the student of ``run`` to ``folder/student``, with its factors rounded to fp16. Angles are float32 in use.

    Raises:
        WadiError: if the run has not saved a student, or ``folder`` cannot be written.
    """
    import shutil

    from safetensors.torch import save_file

    from wadi import roles

    source, place = run / "student", folder / "student"
    _, tensors = roles.read(source)
    with whole_folder(place) as temporary:
        save_file({name: tensor.half() for name, tensor in tensors.items()}, temporary / roles.WEIGHTS)
        for name in (roles.CONFIG, "wadi.json"):
            shutil.copyfile(source / name, temporary / name)
    return place


def measure_quality(folder: Path, sprites: Sprites) -> dict[str, float]:
    """Return the quality of ``folder/teacher`` and ``folder/classifier`` as they load from disk."""
    from wadi.backbones.loading import load_pipeline
    from wadi.zoo.judge import read_classifier
    from wadi.zoo.recipe.autoencoder import held_out_images, reconstruction_psnr, split
    from wadi.zoo.recipe.judge_training import accuracy_on_data
    from wadi.zoo.recipe.teacher import sample

    pipe, classifier = load_pipeline(folder / "teacher"), read_classifier(folder / "classifier")
    held = split(sprites)[1]
    psnr_each, psnr_mean, _ = reconstruction_psnr(pipe.vae, held_out_images(sprites, held))
    direct, through = accuracy_on_data(classifier, pipe.vae, sprites)
    prompts, names, seeds = (list(column) for column in zip(*eval_prompts(), strict=True))
    images = sample(pipe, prompts, seeds)
    parts = {"autoencoder": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}
    sizes = {f"parameters_{k}": sum(p.numel() for p in part.parameters()) for k, part in parts.items()}
    return sizes | {
        "bytes_teacher": sum(file.stat().st_size for file in (folder / "teacher").rglob("*.safetensors")),
        "held_out": len(held),
        "psnr_each": psnr_each,
        "psnr_mean": psnr_mean,
        "classifier_data": direct,
        "classifier_autoencoder": through,
        "teacher_top1": classifier.top1(images, names),
        "teacher_pictures": len(names),
    }


def write_card(folder: Path, quality: dict[str, float]) -> None:
    """Write ``quality.json`` and the card ``README.md`` of the weights in ``folder``."""
    write_whole(folder / "quality.json", (json.dumps(quality, indent=1, sort_keys=True) + "\n").encode())
    q = quality | {"concepts": len(CONCEPTS), "styles": ", ".join(STYLES), "colours": ", ".join(COLOURS)}
    write_whole(folder / "README.md", CARD.read_text().format(machine=platform.machine(), **q).encode())
