"""CLIP score: the cosine between an image's embedding and its prompt's, by any CLIP of transformers.

Papers print it as a cosine (0.31) or a hundred times that (torchmetrics, which also takes a mean below 0 for 0); here it is the
cosine. It depends on the network more than on most generators, so the network's name and digest go with the number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.records import Finite, Record, convert, parse_json
from wadi.io.weights import load_complete
from wadi.metrics import hub
from wadi.metrics.checks import Images, as_bytes, rows

VIT_B_32, VIT_L_14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


@dataclass(frozen=True)
class Clip:
    """A CLIP ready to embed: ``images`` and ``texts`` give unit vectors ``(n, d)``, float32 on the CPU."""

    name: str
    digest: str  # sha256 of the weights
    model: Any  # transformers' CLIPModel
    tokenizer: Any
    fit: str = "crop"  # "crop": shorter side to the network's, centre kept; "pad": longer side, black around
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    device: str = "cpu"

    @torch.no_grad()
    def images(self, images: Images) -> Tensor:
        """Embeddings of images as an extractor takes them."""
        size = self.model.config.vision_config.image_size
        fit = crop if self.fit == "crop" else pad
        pixels = torch.stack([fit(picture, size) for picture in as_bytes(images)])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        pooled = self.model.vision_model(pixel_values=((pixels - mean) / std).to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=1).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, each cut to as many tokens as the network takes (77 in all published ones)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=1).cpu()

    def protocol(self) -> dict[str, Any]:
        """What two numbers must share to be comparable, for a result file."""
        size = self.model.config.vision_config.image_size
        about = {"network": self.name, "digest": self.digest, "size": size, "fit": self.fit, "mean": self.mean, "std": self.std}
        return about | {"tokenizer": tokenizer_digest(self.tokenizer)}


def load_clip(name_or_path: str | Path = VIT_B_32, device: str = "cpu", tokenizer: str | Path | None = None) -> Clip:
    """A CLIP from a folder or a Hub id in float32, and its tokenizer, of the same place if not told.

    Raises:
        WadiError: if it is not on this machine and cannot be fetched, or is no CLIP.
    """

    def load(name: str) -> Any:
        from transformers import CLIPModel

        return load_complete(CLIPModel, name, f"CLIP {name!r}", dtype=torch.float32)

    model = hub.pretrained(load, name_or_path, "a CLIP of transformers").eval().requires_grad_(False).to(device)
    about = convert(_preprocessing(str(name_or_path)), Preprocessing, f"preprocessor_config.json of {str(name_or_path)!r}")
    mean, std = about.image_mean, about.image_std
    return Clip(
        str(name_or_path),
        hub.digest(model),
        model,
        load_tokenizer(tokenizer or name_or_path),
        mean=mean,
        std=std,
        device=device,
    )


def load_tokenizer(name_or_path: str | Path) -> Any:
    """A tokenizer from a folder or a Hub id; errors as `load_clip`."""

    def load(name: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)

    return hub.pretrained(load, name_or_path, "a tokenizer of transformers")


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what decides which tokens a prompt becomes: vocabulary, rules, added and special tokens."""
    about = {"kind": type(tokenizer).__name__, "special": tokenizer.special_tokens_map, "side": tokenizer.padding_side}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = parse_json(backend.to_str(), Any, "The tokenizer") if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # Padding and truncation are settings of the last call.
    about["rules"] = {name: value for name, value in rules.items() if name not in ("padding", "truncation", "version")}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


class Preprocessing(Record):
    """What is used of a ``preprocessor_config.json``."""

    image_mean: tuple[Finite, Finite, Finite] = MEAN
    image_std: tuple[Finite, Finite, Finite] = STD


def _preprocessing(name: str) -> dict[str, Any]:
    """``preprocessor_config.json``; models saved without it are taken to be trained on OpenAI's normalisation."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Cosine ``(n,)`` of each image's embedding ``(n, d)`` with its prompt's.

    Raises:
        WadiError: if they do not pair, or one is not finite.
    """
    if image_embeds.shape != text_embeds.shape:
        raise WadiError(
            f"Received embeddings of {tuple(image_embeds.shape)} for images and {tuple(text_embeds.shape)} for prompts. "
            "Expected one prompt for each image."
        )
    images, texts = (rows(part, 1, "CLIP score") for part in (image_embeds, text_embeds))
    return F.cosine_similarity(images, texts, dim=1)


def similarities(images: Images, prompts: Sequence[str], model: Clip) -> Tensor:
    """Cosine ``(n,)`` of each image with its prompt; `cosines` of their embeddings."""
    check_pairs(images, prompts)
    return cosines(model.images(images), model.texts(prompts))


def clip_score(images: Images, prompts: Sequence[str], model: Clip) -> float:
    """Mean of `similarities`: 0.31 is what torchmetrics prints as 31.

    Raises:
        WadiError: if there are no images, or not one prompt for each.
    """
    return float(similarities(images, prompts, model).mean())


def check_pairs(images: Images, prompts: Sequence[str]) -> None:
    """Raise a WadiError unless there is one prompt for each image, and one image at least."""
    if not len(images) or len(images) != len(prompts):
        raise WadiError(f"Received {len(images)} images and {len(prompts)} prompts. Expected one prompt for each image.")


def crop(picture: Tensor, size: int) -> Tensor:
    """uint8 ``(3, h, w)`` to ``(3, size, size)`` in [0, 1]: shorter side to ``size`` by PIL's bicubic, then the centre.

    As the image processors of CLIP do.
    """
    height, width = picture.shape[1:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    array = np.asarray(image)[top : top + size, left : left + size]
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


def pad(picture: Tensor, size: int) -> Tensor:
    """uint8 ``(3, h, w)`` to ``(3, size, size)``: longer side to ``size`` by antialiased bicubic in float32, black around.

    As HPSv2 does on tensors (with a torchvision that antialiases them, 0.17 or later).
    """
    height, width = picture.shape[1:]
    image = picture.float()[None] / 255
    if max(height, width) != size:
        scale = size / max(height, width)
        height, width = round(height * scale), round(width * scale)
        image = F.interpolate(image, (height, width), mode="bicubic", align_corners=False, antialias=True)
        top, left = (size - height) // 2, (size - width) // 2
        image = F.pad(image, (left, size - width - left, top, size - height - top))
    return image[0]
