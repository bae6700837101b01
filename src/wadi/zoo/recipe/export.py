"""Stage 5 of the recipe: the shipped folders in fp16 safetensors, their measured quality and their card."""

from __future__ import annotations

import copy
import json
import platform
from pathlib import Path
from typing import Any

from torch import nn

from wadi.backbones.saving import write_pipeline
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.io.files import whole_folder, write_whole
from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import eval_pair_prompts, eval_prompts
from wadi.zoo.recipe.icons import Sprites
from wadi.zoo.recipe.kinds import Kind

CARDS = {"unet": Path(__file__).parent / "card.md", "dit": Path(__file__).parent / "card-dit.md"}


def export_pipeline(pipe: Any, folder: Path) -> int:
    """Save ``pipe`` in fp16 as a diffusers folder, without changing ``pipe``. Return the number of bytes of its weights."""
    half = copy.deepcopy(pipe)
    for part in half.components.values():
        if isinstance(part, nn.Module):
            part.half()
    with whole_folder(folder) as temporary:
        write_pipeline(half, temporary)
        if type(half.tokenizer).__name__ == "CLIPTokenizer":
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


def measure_quality(folder: Path, sprites: Sprites, kind: Kind) -> dict[str, float]:
    """Return the quality of ``folder/teacher`` and ``folder/classifier`` as they load from disk."""
    from wadi.backbones.loading import load_pipeline
    from wadi.zoo.judge import read_classifier
    from wadi.zoo.recipe.autoencoder import held_out_images, reconstruction_psnr, split
    from wadi.zoo.recipe.judge_training import accuracy_on_data, pair_accuracy_on_data
    from wadi.zoo.recipe.teacher import sample

    pipe, classifier = load_pipeline(folder / "teacher"), read_classifier(folder / "classifier")
    held = split(sprites)[1]
    psnr_each, psnr_mean, _ = reconstruction_psnr(pipe.vae, held_out_images(sprites, held))
    direct, through = accuracy_on_data(classifier, pipe.vae, sprites)
    prompts, names, seeds = (list(column) for column in zip(*eval_prompts(), strict=True))
    parts = {"autoencoder": pipe.vae, "text_encoder": pipe.text_encoder, kind.network: getattr(pipe, kind.network)}
    quality = {f"parameters_{k}": sum(p.numel() for p in part.parameters()) for k, part in parts.items()}
    quality |= {
        "bytes_teacher": sum(file.stat().st_size for file in (folder / "teacher").rglob("*.safetensors")),
        "held_out": len(held),
        "psnr_each": psnr_each,
        "psnr_mean": psnr_mean,
        "classifier_data": direct,
        "classifier_autoencoder": through,
        "teacher_top1": classifier.top1(sample(pipe, prompts, seeds, kind), names),
        "teacher_pictures": len(names),
    }
    if kind.shows_pairs:
        pair_prompts, pairs, pair_seeds = (list(column) for column in zip(*eval_pair_prompts(), strict=True))
        data, data_through = pair_accuracy_on_data(classifier, pipe.vae, sprites)
        quality |= {
            "classifier_pairs": data,
            "classifier_pairs_autoencoder": data_through,
            "teacher_pairs": classifier.top2(sample(pipe, pair_prompts, pair_seeds, kind), pairs),
            "teacher_pair_pictures": len(pairs),
        }
        pipe.scheduler = one_step_scheduler(pipe.scheduler, pipe.scheduler.config.num_train_timesteps - 1)
        quality["teacher_one_step"] = classifier.top1(sample(pipe, prompts, seeds, kind, steps=1), names)
    return quality


def write_card(folder: Path, quality: dict[str, float], kind: Kind) -> None:
    """Write ``quality.json`` and the card ``README.md`` of the weights in ``folder``."""
    write_whole(folder / "quality.json", (json.dumps(quality, indent=1, sort_keys=True) + "\n").encode())
    q = quality | {"concepts": len(CONCEPTS), "styles": ", ".join(STYLES), "colours": ", ".join(COLOURS)}
    write_whole(folder / "README.md", CARDS[kind.name].read_text().format(machine=platform.machine(), **q).encode())
