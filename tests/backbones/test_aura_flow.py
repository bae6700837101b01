"""AuraFlow's family against the laws. `python test_aura_flow.py` saves its small pipeline into the folder ``small``."""

import re

import aura_flow  # registers the family
import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from wadi.testing import Conformance, Family, components


def small_pipeline():
    """The pipeline's own classes with random weights. No setting is neutral: where a family ignores one, a test fails."""
    torch.manual_seed(0)
    words, _ = components.t5()
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    network = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = AuraFlowPipeline(
        tokenizer=words, text_encoder=text, vae=components.autoencoder(scaling_factor=0.4), transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip
    return components.readied(pipeline)


def adapted(name, module):
    """Whether the student's adapter belongs on a layer."""
    return isinstance(module, nn.Linear) and not re.search(r"time_step|norm|pos_embed", name)


@pytest.fixture(scope="session")
def family():
    return Family(
        small_pipeline(),
        adapted=adapted,
        fake=lambda name, module: adapted(name, module) and "_transformer_blocks." in name,
        last=1000,  # the last timestep; 999 if the network predicts noise
        features=False,  # the network has neither `mid_block` nor `transformer_blocks`
    )


class TestAuraFlow(Conformance):
    """See `Conformance`."""


if __name__ == "__main__":
    small_pipeline().save_pretrained("small")
    print(f"{aura_flow.AuraFlow.__name__}: small")
