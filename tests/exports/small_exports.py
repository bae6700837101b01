"""Small pipelines in the shapes of Stable Diffusion 1.x, 2.x and SDXL, and tensor names of their original checkpoints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))

import small_pipelines

import tiny


def sdxl(folder):
    """SDXL's two text encoders have different widths; diffusers tells them apart by this."""
    pipeline = small_pipelines.sdxl(folder)
    words = pipeline.tokenizer
    pipeline.register_modules(text_encoder=small_pipelines.clip_text(words, 8))
    pipeline.register_modules(text_encoder_2=small_pipelines.clip_text(words, 24, 16))
    return pipeline


MAKERS = {
    "sd1": tiny.stable_diffusion,
    "sd2": lambda folder: tiny.stable_diffusion(folder, "v_prediction", use_linear_projection=True),
    "sdxl": sdxl,
}
KEYS = {
    "sd1": (
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.output_blocks.1.2.conv.weight",
        "model.diffusion_model.time_embed.2.bias",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ),
    "sd2": (
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.ln_final.bias",
    ),
    "sdxl": (
        "model.diffusion_model.label_emb.0.2.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight",
    ),
}
