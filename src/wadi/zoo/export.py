"""Stage 5 of the recipe: the shipped folders in fp16 safetensors, their measured quality and their card."""

from __future__ import annotations

import copy
import json
import platform
from pathlib import Path
from typing import Any

from wadi.files import whole_folder, write_whole
from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.icons import Sprites


def export_pipeline(pipe: Any, folder: Path) -> int:
    """Save ``pipe`` in fp16 as a diffusers folder (the pipeline itself stays as it is); bytes of its weights."""
    half = copy.deepcopy(pipe)
    for part in (half.vae, half.text_encoder, half.unet):
        part.half()
    with whole_folder(folder) as temporary:
        half.save_pretrained(temporary, safe_serialization=True)
        _ask_for_float32(temporary / "text_encoder" / "config.json")
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _ask_for_float32(path: Path) -> None:
    # transformers 5 loads in the dtype the configuration names, diffusers in float32: a plain load must not mix them.
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure_weights(folder: Path, sprites: Sprites) -> dict[str, float]:
    """Quality of ``folder/teacher`` and ``folder/classifier`` as they load from disk."""
    from wadi.backbones.loading import load_pipeline
    from wadi.zoo.autoencoder import held_out_pictures, measure, split
    from wadi.zoo.classifier import judge_data, read_classifier
    from wadi.zoo.prompts import eval_prompts
    from wadi.zoo.teacher import sample

    pipe, classifier = load_pipeline(folder / "teacher"), read_classifier(folder / "classifier")
    held = split(sprites)[1]
    psnr_each, psnr_mean, _ = measure(pipe.vae, held_out_pictures(sprites, held))
    direct, through = judge_data(classifier, pipe.vae, sprites)
    prompts, names, seeds = (list(column) for column in zip(*eval_prompts(), strict=True))
    pictures = sample(pipe, prompts, seeds)
    parts = {"autoencoder": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}
    sizes = {f"parameters_{k}": sum(p.numel() for p in part.parameters()) for k, part in parts.items()}
    return sizes | {
        "bytes_teacher": sum(file.stat().st_size for file in (folder / "teacher").rglob("*.safetensors")),
        "held_out": len(held),
        "psnr_each": psnr_each,
        "psnr_mean": psnr_mean,
        "classifier_data": direct,
        "classifier_autoencoder": through,
        "teacher_top1": classifier.top1(pictures, names),
        "teacher_pictures": len(names),
    }


def write_card(folder: Path, quality: dict[str, float]) -> None:
    """``quality.json`` and ``README.md``, the card, of the weights in ``folder``."""
    write_whole(folder / "quality.json", (json.dumps(quality, indent=1, sort_keys=True) + "\n").encode())
    q = quality | {"concepts": len(CONCEPTS), "styles": ", ".join(STYLES), "colours": ", ".join(COLOURS)}
    write_whole(folder / "README.md", _CARD.format(machine=platform.machine(), **q).encode())


_CARD = """# The embedded teacher

A text-to-image pipeline that draws {concepts} things as emoji, 64 x 64 pixels, from captions such as
"pizza, noto style, on a blue background". It exists to be distilled within minutes on two CPU cores, not to be useful
by itself: it knows the words of its captions and nothing else.

Made by `wadi zoo train`; this page and `quality.json` are written by its last stage. docs/zoo.md tells how and why.

## Parts
| folder | what | parameters |
|---|---|---|
| `teacher/vae` | `AutoencoderKL`, (3, 64, 64) to (12, 16, 16), latents of zero mean and unit variance per channel | {parameters_autoencoder:,} |
| `teacher/text_encoder` | `CLIPTextModel`, 3 layers of width 192, 24 tokens, trained with the U-Net | {parameters_text_encoder:,} |
| `teacher/unet` | `UNet2DConditionModel`, widths 96, 128, 192, pooled text added to the time embedding | {parameters_unet:,} |
| `teacher/scheduler` | `DDIMScheduler`, v-prediction, Stable Diffusion's schedule, trailing spacing | |
| `classifier` | names the concept of a picture; its 96 features are the space of the Frechet distance | |

fp16 safetensors, {bytes_teacher:,} bytes for the teacher. Meant for 25 steps at guidance 2.5.

## Quality, as loaded from these files
| | |
|---|---|
| autoencoder on {held_out} held-out pictures (icons it never saw): mean of PSNR | {psnr_each:.2f} dB |
| the same: PSNR of the mean squared error | {psnr_mean:.2f} dB |
| classifier, top-1 on 2,048 new compositions | {classifier_data:.4f} |
| the same pictures through the autoencoder | {classifier_autoencoder:.4f} |
| teacher, 25 steps, guidance 2.5: the classifier names the prompted concept in | {teacher_top1:.4f} of {teacher_pictures} fixed prompts |

The U-Net trained for {minutes_teacher:.0f} minutes on two CPU cores ({machine}).

## Limits
Concepts: those of `wadi.zoo.CONCEPTS`, no other word means anything. Styles: {styles}. Backgrounds: {colours}.
One object, centred within a little, no scene, no text, no people.

## Data, licences, attribution
Pictures drawn from three emoji sets as packaged by Iconify (`@iconify-json/noto`, `twemoji`, `fluent-emoji-flat`, from
npm); no other data and no pretrained weights.
- Noto Emoji, Google Inc., Apache-2.0, https://github.com/googlefonts/noto-emoji
- Twemoji, Copyright 2020 Twitter, Inc and other contributors, graphics licensed under CC-BY-4.0
  (https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji; they were rasterised, mirrored, scaled
  and laid on coloured backgrounds
- Fluent Emoji, Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji

The weights are offered under Apache-2.0 as the rest of the project, and whoever shares pictures close to Twemoji's should
keep its attribution.
"""
