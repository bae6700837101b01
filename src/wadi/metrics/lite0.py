"""EfficientNet-Lite0 as a pure function of its weights: inverted residuals without squeeze-and-excitation, ReLU6.

Tan and Le, ICML 2019, and the Lite variants of TensorFlow's TPU models. Tensors have the names of the published PyTorch
conversion. Each batch norm is folded into the convolution before it. The classifier is not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from wadi.errors import WadiError

SIZE, DIM = 224, 1280
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks
EPS = 1e-3  # of the batch norms
_NORM_AFTER = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}

Layers = Mapping[str, tuple[Tensor, Tensor]]


def fold(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weight and bias of each convolution with its batch norm folded in.

    Raises:
        WadiError: if tensors are missing.
    """
    try:
        layers = {}
        for name in [key.removesuffix(".weight") for key in state if "conv" in key]:
            block, _, conv = name.rpartition(".")
            norm = f"{block}.{_NORM_AFTER[conv]}".removeprefix(".")
            gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPS).sqrt()
            bias = state[f"{norm}.bias"] - gain * state[f"{norm}.running_mean"]
            layers[name] = (state[f"{name}.weight"] * gain.view(-1, 1, 1, 1), bias)
        _ = layers["_conv_head"], layers[f"_blocks.{len(STRIDES) - 1}._project_conv"]
    except KeyError as error:
        raise WadiError(f"The weights have no tensor {error}. Give those of EfficientNet-Lite0.") from error
    return layers


def pooled(x: Tensor, layers: Layers) -> Tensor:
    """Return the features ``(n, 1280)`` of images ``(n, 3, 224, 224)`` in [0, 255]."""
    # The Lite variants are trained with this scaling. With ImageNet's mean and deviation, photographs would have several times
    # the variance that the batch norm of the stem has recorded.
    h = F.relu6(_conv((x - 127) / 128, layers["_conv_stem"], 2))
    for i, stride in enumerate(STRIDES):
        h = _block(h, f"_blocks.{i}", stride, layers)
    return F.relu6(_conv(h, layers["_conv_head"])).mean((2, 3))


def _block(x: Tensor, name: str, stride: int, layers: Layers) -> Tensor:
    h = x
    if f"{name}._expand_conv" in layers:
        h = F.relu6(_conv(h, layers[f"{name}._expand_conv"]))
    h = F.relu6(_conv(h, layers[f"{name}._depthwise_conv"], stride, groups=h.shape[1]))
    h = _conv(h, layers[f"{name}._project_conv"])
    return h + x if stride == 1 and h.shape == x.shape else h


def _conv(x: Tensor, layer: tuple[Tensor, Tensor], stride: int = 1, groups: int = 1) -> Tensor:
    """Convolve with TensorFlow's 'SAME' padding: an odd pixel of padding goes to the right and the bottom."""
    weight, bias = layer
    kernel = weight.shape[-1]
    height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
    x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    return F.conv2d(x, weight, bias, stride, groups=groups)
