"""The recipe of the embedded teacher, stage by stage. All stages read and write files of one folder.

``data`` renders the sprites. ``autoencoder`` and ``teacher`` train within a budget of minutes each, ``classifier`` for a
number of steps, and each continues where it was interrupted. ``export`` writes the shipped folders, measures them and writes
their card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.zoo.recipe.config import STAGES, ZooConfig

if TYPE_CHECKING:
    from wadi.zoo.recipe.icons import Sprites


def train(config: ZooConfig) -> Path:
    """Run ``config.stage`` (or all), and return the folder of the shipped weights. Run it again after an interruption."""
    import torch

    from wadi.parallel.device import keep_freed_memory

    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    run = {"data": make_data, "autoencoder": autoencoder, "teacher": teacher, "classifier": classifier, "export": export}
    for stage in STAGES if config.stage == "all" else (config.stage,):
        run[stage](config)
    return weights_folder(config)


def weights_folder(config: ZooConfig) -> Path:
    """Return the folder of the shipped weights."""
    default = Path(config.out) / ("weights" if config.model == "unet" else f"weights-{config.model}")
    return Path(config.weights) if config.weights else default


def make_data(config: ZooConfig) -> Sprites:
    """Return the sprites: read from ``OUT/sprites.safetensors``, or downloaded and rendered."""
    from wadi.zoo.recipe.icons import load_sprites, make_sprites, save_sprites

    out = Path(config.out)
    path = out / "sprites.safetensors"
    if not path.is_file():
        save_sprites(path, make_sprites(Path(config.tarballs) if config.tarballs else out / "npm"))
    return load_sprites(path)


def autoencoder(config: ZooConfig) -> Any:
    """Return the finished autoencoder: read from ``OUT/autoencoder-final.safetensors``, or trained.

    The DiT uses that of the embedded U-Net teacher, unless ``OUT`` has one.
    """
    from wadi.backbones.loading import load_pipeline
    from wadi.zoo.paths import embedded_path
    from wadi.zoo.recipe.autoencoder import build_autoencoder, train_autoencoder
    from wadi.zoo.recipe.state import load_tensors, save_tensors

    path = Path(config.out) / "autoencoder-final.safetensors"
    if not path.is_file() and config.model == "dit":
        return load_pipeline(embedded_path("teacher")).vae.eval().requires_grad_(False)
    if not path.is_file():
        save_tensors(path, train_autoencoder(config, make_data(config), Path(config.out)).state_dict())
    ae = build_autoencoder()
    ae.load_state_dict(load_tensors(path)[0])
    return ae.eval().requires_grad_(False)


def teacher(config: ZooConfig) -> None:
    """Train the network and its text encoder, or continue."""
    from wadi.zoo.recipe.teacher import train_teacher

    train_teacher(config, autoencoder(config), make_data(config), Path(config.out))


def classifier(config: ZooConfig) -> None:
    """Train the classifier and write it to the weights folder."""
    from wadi.zoo.recipe.judge_training import save_classifier, train_classifier

    trained = train_classifier(config, autoencoder(config), make_data(config), Path(config.out))
    save_classifier(weights_folder(config) / "classifier", trained)


def export(config: ZooConfig) -> None:
    """Write ``teacher/``, measure it and the classifier as they load from disk, and write the card and ``quality.json``."""
    from wadi.zoo.recipe.export import export_pipeline, measure_quality, write_card
    from wadi.zoo.recipe.teacher import kind_of, load_trained

    folder, kind = weights_folder(config), kind_of(config.model)
    pipe, note = load_trained(autoencoder(config), Path(config.out), kind)
    export_pipeline(pipe, folder / "teacher")
    write_card(folder, measure_quality(folder, make_data(config), kind) | {"minutes_teacher": note["elapsed"] / 60}, kind)
