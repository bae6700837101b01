"""Write examples/subject: five images each of three icons that the embedded teacher was not trained on.

    python bench/dreambooth_subjects.py --sprites runs/zoo/sprites.safetensors     # from `wadi zoo train --stage data`

The icons are Noto Emoji (Google Inc., Apache-2.0). Sizes and positions are those of the teacher's training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wadi.io.grids import save_png, to_pil
from wadi.zoo.concepts import COLOURS, CONCEPTS
from wadi.zoo.recipe.compose import Pose, compose, random_pose
from wadi.zoo.recipe.icons import load_sprites
from wadi.zoo.recipe.teacher import SMALLEST

SUBJECTS = ("green-apple", "teddy-bear", "alarm-clock")
BACKGROUNDS = ("white", "yellow", "pink", "blue", "grey")  # prompts can name the other five


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=Path("runs/zoo/sprites.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("examples/subject"))
    args = parser.parse_args()
    sprites = load_sprites(args.sprites)
    at = {(icon, style): i for i, (icon, style) in enumerate(zip(sprites.icons, sprites.styles, strict=True))}
    names = list(COLOURS)
    for number, subject in enumerate(SUBJECTS):
        assert subject not in CONCEPTS.values(), f"the teacher was trained on {subject}"
        pose = random_pose(len(BACKGROUNDS), torch.Generator().manual_seed(number), SMALLEST, mirror=False)
        colour = torch.tensor([names.index(name) for name in BACKGROUNDS])
        rgb = torch.tensor([COLOURS[name] for name in BACKGROUNDS]) / 255
        sprite = sprites.pixels[at[subject, "noto"]].expand(len(BACKGROUNDS), -1, -1, -1)
        for name, image in zip(BACKGROUNDS, compose(sprite, Pose(colour, rgb, pose.theta)), strict=True):
            save_png(to_pil(image), args.out / subject / f"{name}.png")
    (args.out / "README.md").write_text(README)


README = """# Three subjects for `wadi dreambooth`

Five images each of a green apple, a teddy bear and an alarm clock, 64 x 64, on plain backgrounds. The embedded teacher was
not trained on any of the three icons; its autoencoder was. `python bench/dreambooth_subjects.py` made the images
([docs/dreambooth.md](../../docs/dreambooth.md) uses them).

From Noto Emoji, Google Inc., Apache-2.0, https://github.com/googlefonts/noto-emoji; they were rasterised, scaled and laid on
coloured backgrounds.
"""

if __name__ == "__main__":
    main()
