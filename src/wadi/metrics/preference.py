"""Scores learned from people's choices: PickScore, HPSv2, ImageReward and LAION's aesthetic score, all through transformers.

They need neither their authors' packages nor the old versions that these pin. Each is a `Preference`, from images and prompts
to one score for each image. Higher is better. Scores of different kinds have different scales.

    PickScore    exp(logit scale) cos(image, prompt)          CLIP ViT-H/14, Kirstain et al., NeurIPS 2023
    HPSv2        cos(image, prompt)                           CLIP ViT-H/14, Wu et al., 2023
    ImageReward  (head(BLIP(image, prompt)[CLS]) - m) / s     BLIP ViT-L/16, Xu et al., NeurIPS 2023
    aesthetic    head(CLIP image embedding)                   CLIP ViT-L/14, Schuhmann, 2022; ignores prompts
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.metrics import foreign, hub
from wadi.metrics.checks import Images, as_bytes, rows
from wadi.metrics.clip import (
    MEAN,
    STD,
    VIT_L_14,
    Clip,
    check_pairs,
    cosines,
    crop,
    load_clip,
    load_tokenizer,
    tokenizer_digest,
)

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and HPSv2 use its tokenizer
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2, HPSV2_FILES = "xswu/HPSv2", {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
IMAGE_REWARD, IMAGE_REWARD_FILE = "THUDM/ImageReward", "ImageReward.pt"
BERT = "google-bert/bert-base-uncased"  # ImageReward uses its tokenizer
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward's raw scores, from its code
REWARD_TOKENS = 35


@dataclass(frozen=True)
class Preference:
    """A preference model. ``preference(images, prompts)`` returns the scores ``(n,)``, float64 on the CPU.

    Raises:
        WadiError: if there is not one prompt for each image, or a score is not finite.
    """

    name: str
    digest: str  # sha256 of all weights
    score: Callable[[Images, Sequence[str]], Tensor]
    tokenizer: str | None = None  # digest; None where prompts do not enter

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        check_pairs(images, prompts)
        return rows(self.score(images, prompts).double().cpu()[:, None], 1, self.name)[:, 0]

    def protocol(self) -> dict[str, Any]:
        """Return what two scores must share to be comparable, for a result file."""
        return {"network": self.name, "digest": self.digest} | ({"tokenizer": self.tokenizer} if self.tokenizer else {})


def pickscore(name_or_path: str | Path = PICKSCORE, tokenizer: str | Path = CLIP_H, device: str = "cpu") -> Preference:
    """Load PickScore as a CLIP of transformers. Errors are those of `load_clip`."""
    clip = load_clip(name_or_path, device, tokenizer)
    scale, token_rules = float(clip.model.logit_scale.exp()), tokenizer_digest(clip.tokenizer)
    return Preference(
        "PickScore", clip.digest, lambda i, p: scale * cosines(clip.embed_images(i), clip.embed_texts(p)), token_rules
    )


def hpsv2(
    weights: str | Path | None = None,
    version: str | None = None,
    tokenizer: str | Path = CLIP_H,
    device: str = "cpu",
    config: Any = None,
) -> Preference:
    """Load HPSv2 from the open_clip checkpoint that its authors publish.

    Args:
        weights: that file; None = from the Hub.
        version: '2.0' or '2.1', two networks of one architecture whose scores are not comparable. None = 2.1 from the Hub, or
            the version in the published file's name. With a file of another name the score is called HPSv2.
        config: a ``CLIPConfig``; None = ViT-H/14.
    Raises:
        WadiError: if the weights or the tokenizer are not on this machine and cannot be downloaded, or are something else.
    """
    from transformers import CLIPModel

    version_of_file = hpsv2_version(weights) if weights is not None else version or "2.1"
    if version is not None and version not in HPSV2_FILES:
        raise WadiError(f"HPSv2 version is {version!r}. It must be one of {', '.join(HPSV2_FILES)}.")
    if version_of_file is not None and version not in (None, version_of_file):
        raise WadiError(
            f"{str(weights)!r} is the file of HPSv{version_of_file}, but version is {version}. Give the other file."
        )
    file = Path(weights) if weights is not None else hub.hub_file(HPSV2, HPSV2_FILES[version_of_file or "2.1"])
    name = f"HPSv{version or version_of_file or 2}"
    model = CLIPModel(config or _vit_h_14())
    hub.load_into(model, foreign.openclip(hub.read_weights(file)), str(file))
    model = model.eval().requires_grad_(False).to(device)
    clip = Clip(name, hub.digest(file), model, load_tokenizer(tokenizer), fit="pad", device=device)
    token_rules = tokenizer_digest(clip.tokenizer)
    return Preference(clip.name, clip.digest, lambda i, p: cosines(clip.embed_images(i), clip.embed_texts(p)), token_rules)


def hpsv2_version(path: str | Path) -> str | None:
    """Return the version in the name of a checkpoint, or None."""
    return next((version for version, name in HPSV2_FILES.items() if Path(path).name == name), None)


def _vit_h_14() -> Any:
    from transformers import CLIPConfig

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    shared = {"hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(
        text_config=text | shared | {"eos_token_id": 49407},
        vision_config=vision | shared | {"patch_size": 14},
        projection_dim=1024,
    )


def image_reward(
    weights: str | Path | None = None,
    tokenizer: str | Path = BERT,
    device: str = "cpu",
    vision: Any = None,
    text: Any = None,
) -> Preference:
    """Load ImageReward from the checkpoint that its authors publish.

    Args:
        weights: that file; None = from the Hub.
        vision, text: a ``BlipVisionConfig`` and a ``BlipTextConfig``; None = ViT-L/16 at 224 pixels and BERT base.
    Raises:
        WadiError: as `hpsv2`.
    """
    from transformers import BlipTextModel, BlipVisionModel

    file = Path(weights) if weights is not None else hub.hub_file(IMAGE_REWARD, IMAGE_REWARD_FILE)
    states = foreign.image_reward(hub.read_weights(file))
    image_encoder = BlipVisionModel(vision or _blip_vision())
    text_encoder = BlipTextModel(text or _blip_text(image_encoder.config.hidden_size), add_pooling_layer=False)
    head = LinearHead(text_encoder.config.hidden_size)
    for module, state in zip((image_encoder, text_encoder, head), states, strict=True):
        hub.load_into(module, state, str(file))
        module.eval().requires_grad_(False).to(device)
    size: Any = image_encoder.config.image_size
    text_tokenizer, mean, std = load_tokenizer(tokenizer), *(torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def score(images: Images, prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([crop(image, size) for image in as_bytes(images)])
        image_states = image_encoder(pixel_values=((pixels - mean) / std).to(device)).last_hidden_state
        tokens = text_tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt"
        )
        text_states = text_encoder(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long, device=device),
        )
        return (head(text_states.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD

    return Preference("ImageReward", hub.digest(file), score, tokenizer_digest(text_tokenizer))


def _blip_vision() -> Any:
    from transformers import BlipVisionConfig

    return BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,  # of the published network; transformers has another default
    )


def _blip_text(image_width: int) -> Any:
    from transformers import BlipTextConfig

    return BlipTextConfig(
        num_attention_heads=12, encoder_hidden_size=image_width
    )  # BERT base; transformers' default has 8 heads


def aesthetic(weights: str | Path | None = None, clip: str | Path = VIT_L_14, device: str = "cpu") -> Preference:
    """Load LAION's aesthetic score, about 1 to 10: a linear head on the unit embedding of an image.

    Args:
        weights: the head's file, as published or as safetensors; None = in `wadi.io.user_cache.cache_folder`.
        clip: the CLIP that the head was trained on, or a folder with it.
    Raises:
        WadiError: as `hpsv2`, or if the head belongs to another CLIP.
    """
    file = hub.weights_file(weights, AESTHETIC_FILE, AESTHETIC_URL)
    clip_model = load_clip(clip, device)
    head = LinearHead(clip_model.model.config.projection_dim)
    hub.load_into(head, hub.read_weights(file), str(file))
    head.eval().requires_grad_(False)
    combined_digest = hashlib.sha256(f"{clip_model.digest} {hub.digest(file)}".encode()).hexdigest()
    return Preference("aesthetic", combined_digest, lambda images, prompts: head(clip_model.embed_images(images))[:, 0])


class LinearHead(nn.Module):
    """The head of ImageReward and of the aesthetic score: five linear layers without activations, with the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        dropout = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], *linear[3:])

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(n, 1)`` of embeddings ``(n, width)``."""
        return self.layers(x)
