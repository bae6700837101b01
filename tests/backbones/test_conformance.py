"""Every family of the package against `wadi.testing.Conformance`."""

import re

import pytest
import small_pipelines
from torch import nn

from wadi.testing import Conformance, Family

UNET_LINEARS = ("down_blocks.", "mid_block.", "up_blocks.")


def linear(name, module):
    return isinstance(module, nn.Linear)


def in_unet_blocks(name, module):
    return linear(name, module) and name.startswith(UNET_LINEARS)


def in_attention_blocks(name, module):
    return in_unet_blocks(name, module) and not re.search(r"proj_in|proj_out|time_emb_proj", name)


def in_transformer_blocks(name, module):
    return linear(name, module) and name.startswith("transformer_blocks.")


def not_modulation(name, module):
    """All but what turns timestep and pooled text into shifts and scales."""
    return linear(name, module) and not re.search(
        r"time_text_embed|time_guidance_embed|stream_modulation|time_embed|distilled_guidance|adaln_single|norm\w*\.linear",
        name,
    )


def in_lumina2(name, module):
    return linear(name, module) and not re.search(r"timestep_embedder|norm1\.linear|norm_out\.linear_1", name)


def in_lumina2_blocks(name, module):
    return in_lumina2(name, module) and name.startswith(("layers.", "noise_refiner.", "context_refiner."))


def in_qwen_image(name, module):
    """The text after the last block is thrown away, so what only computes it has no adapter."""
    unused = r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp)"
    return not_modulation(name, module) and not re.search(rf"(img|txt)_mod|{unused}", name)


def in_any_block(name, module):
    return not_modulation(name, module) and "transformer_blocks." in name


def in_sana(name, module):
    return not_modulation(name, module) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and ".ff." in name)


def in_z_image(name, module):
    return linear(name, module) and not re.search(r"t_embedder|adaLN", name)


UNET = {"adapted": in_unet_blocks, "fake": in_attention_blocks}


def flux2_mu(tokens, steps):
    """Between the lines of 10 and 200 steps over the tokens, as Black Forest Labs' sampling code has them."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_10 + (at_200 - at_10) * (steps - 10) / 190


KNOWN = {
    "sd1": UNET,
    "sd2": UNET,
    "sdxl": UNET,
    "pixart-alpha": {"adapted": not_modulation, "fake": in_transformer_blocks},
    "pixart-sigma": {"adapted": not_modulation, "fake": in_transformer_blocks},
    # the last block's text stream ends in attention, and its query is computed for nothing
    "sd3": {"adapted": not_modulation, "fake": in_any_block, "last": 1000, "idle": ("transformer_blocks.1.attn.add_q_proj",)},
    "flux": {"adapted": not_modulation, "fake": in_any_block, "last": 1000},
    "z-image": {
        "adapted": in_z_image,
        "fake": lambda n, m: in_z_image(n, m) and "embedder" not in n and "final" not in n,
        "last": 1000,
        "features": False,
    },
    "sana": {"adapted": in_sana, "fake": lambda n, m: in_sana(n, m) and "transformer_blocks." in n, "last": 1000},
    "lumina2": {"adapted": in_lumina2, "fake": in_lumina2_blocks, "last": 1000, "features": False, "traceable": False},
    "chroma": {"adapted": not_modulation, "fake": in_any_block, "last": 1000},
    "flux2-klein": {"adapted": not_modulation, "fake": in_any_block, "last": 1000, "mu": flux2_mu},
    "flux2": {"adapted": not_modulation, "fake": in_any_block, "last": 1000, "mu": flux2_mu, "second_pass": False},
    "qwen-image": {
        "adapted": in_qwen_image, "fake": lambda n, m: in_qwen_image(n, m) and "transformer_blocks." in n, "last": 1000
    },
}  # fmt: skip


@pytest.fixture(scope="session", params=list(small_pipelines.MAKERS))
def family(request, tmp_path_factory):
    pipeline = small_pipelines.make(request.param, tmp_path_factory.mktemp(request.param))
    return Family(pipeline, resolution=small_pipelines.RESOLUTIONS.get(request.param), **KNOWN[request.param])


class TestFamilies(Conformance):
    """See `Conformance`."""
