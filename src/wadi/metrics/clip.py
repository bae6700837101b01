"""CLIP score: the cosine between the embedding of an image and that of its prompt, by any CLIP of transformers.

The score of a set is the mean of `similarities`. Papers print it as a cosine (0.31) or times 100; torchmetrics prints 31, and
0 for a mean below 0. Here it is the cosine. It depends more on the CLIP network than on most generators, so results name the
network and its digest.
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
from wadi.io.weight_checks import load_complete
from wadi.metrics import hub
from wadi.metrics.checks import Images, as_bytes, rows

VIT_B_32, VIT_L_14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


@dataclass(frozen=True)
class Clip:
    """A CLIP that is ready to use. Its embeddings are unit vectors ``(n, d)``, float32 on the CPU."""

    name: str
    digest: str  # sha256 of the weights
    model: Any  # transformers' CLIPModel
    tokenizer: Any
    fit: str = "crop"  # "crop": keep the central square; "pad": keep the whole image, with black around it
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    device: str = "cpu"

    @torch.no_grad()
    def embed_images(self, images: Images) -> Tensor:
        """Return the embeddings of images, which are given as to an `Extractor`."""
        size = self.model.config.vision_config.image_size
        fit = crop if self.fit == "crop" else pad
        pixels = torch.stack([fit(image, size) for image in as_bytes(images)])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        pooled = self.model.vision_model(pixel_values=((pixels - mean) / std).to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts. Each is cut to the network's number of tokens (77 in all published ones)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=1).cpu()

    def protocol(self) -> dict[str, Any]:
        """Return what two scores must share to be comparable, for a result file."""
        size = self.model.config.vision_config.image_size
        about = {"network": self.name, "digest": self.digest, "size": size, "fit": self.fit, "mean": self.mean, "std": self.std}
        return about | {"tokenizer": tokenizer_digest(self.tokenizer)}


def load_clip(name_or_path: str | Path = VIT_B_32, device: str = "cpu", tokenizer: str | Path | None = None) -> Clip:
    """Load a CLIP in float32 from a folder or a Hub id.

    Args:
        tokenizer: folder or Hub id; None = that of ``name_or_path``.
    Raises:
        WadiError: if it is not on this machine and cannot be downloaded, or is not a CLIP.
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
    """Load a tokenizer from a folder or a Hub id. Errors are those of `load_clip`."""

    def load(name: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)

    return hub.pretrained(load, name_or_path, "a tokenizer of transformers")


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what turns a prompt into tokens: vocabulary, rules, added and special tokens."""
    about = {"kind": type(tokenizer).__name__, "special": tokenizer.special_tokens_map, "side": tokenizer.padding_side}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = parse_json(backend.to_str(), Any, "The tokenizer") if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # Padding and truncation are settings of the last call.
    about["rules"] = {name: value for name, value in rules.items() if name not in ("padding", "truncation", "version")}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


class Preprocessing(Record):
    """The entries of a ``preprocessor_config.json`` that are used."""

    image_mean: tuple[Finite, Finite, Finite] = MEAN
    image_std: tuple[Finite, Finite, Finite] = STD


def _preprocessing(name: str) -> dict[str, Any]:
    """Read ``preprocessor_config.json``. A model without it is taken to use OpenAI's normalisation."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Return the cosine ``(n,)`` of each image's embedding ``(n, d)`` with that of its prompt.

    Raises:
        WadiError: if there are not as many of both, or one is not finite.
    """
    if image_embeds.shape != text_embeds.shape:
        raise WadiError(
            f"Embeddings of images have shape {tuple(image_embeds.shape)}, those of prompts {tuple(text_embeds.shape)}. "
            "Give one prompt for each image."
        )
    images, texts = (rows(part, 1, "CLIP score") for part in (image_embeds, text_embeds))
    return F.cosine_similarity(images, texts, dim=1)


def similarities(images: Images, prompts: Sequence[str], model: Clip) -> Tensor:
    """Return the cosine ``(n,)`` of each image with its prompt: 0.31 is what torchmetrics prints as 31."""
    check_pairs(images, prompts)
    return cosines(model.embed_images(images), model.embed_texts(prompts))


def check_pairs(images: Images, prompts: Sequence[str]) -> None:
    """Raise a WadiError unless there is one prompt for each image, and at least one image."""
    if not len(images) or len(images) != len(prompts):
        raise WadiError(f"There are {len(images)} images and {len(prompts)} prompts. Give one prompt for each image.")


def crop(image: Tensor, size: int) -> Tensor:
    """Turn uint8 ``(3, h, w)`` into the central ``(3, size, size)`` in [0, 1], as the image processors of CLIP do.

    PIL's bicubic filter first brings the shorter side to ``size``.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    resized = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    array = np.asarray(resized)[top : top + size, left : left + size]
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


def pad(image: Tensor, size: int) -> Tensor:
    """Turn uint8 ``(3, h, w)`` into ``(3, size, size)`` in [0, 1], with black around, as HPSv2 does.

    The antialiased bicubic filter in float32 brings the longer side to ``size``. HPSv2 antialiases with torchvision 0.17 or
    later.
    """
    height, width = image.shape[1:]
    pixels = image.float()[None] / 255
    if max(height, width) != size:
        scale = size / max(height, width)
        height, width = round(height * scale), round(width * scale)
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        top, left = (size - height) // 2, (size - width) // 2
        pixels = F.pad(pixels, (left, size - width - left, top, size - height - top))
    return pixels[0]
