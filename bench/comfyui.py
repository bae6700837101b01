"""Export a student of Stable Diffusion 1.5's shapes, and generate with ComfyUI's own code from its files and workflows.

    python bench/comfyui.py /path/to/ComfyUI
    python bench/comfyui.py /path/to/ComfyUI --timesteps 999 749 499 249

ComfyUI is a clone with its requirements installed. The weights are random, the images 64 x 64 pixels. It needs 12 GB of memory,
20 GB in ``--work``, and minutes on a CPU. ComfyUI checks each workflow (``execution.validate_prompt``), then the nodes run one
after the other. The command prints the difference to the latents and images of ``wadi.load`` from the same seed. For a student
of several steps ComfyUI's later noise is replaced by that of diffusers: each draws its own.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROMPT, SEED, SCALE = "red apple", 5, 0.18215


def make_teacher(comfyui, folder):
    """Write a pipeline with random weights. The words are those of ComfyUI's CLIP tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(str(comfyui / "comfy" / "sd1_tokenizer"), model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, hidden_act="quick_gelu",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, scheduler=scheduler, safety_checker=None,
        unet=UNet2DConditionModel(sample_size=8, cross_attention_dim=768, attention_head_dim=8), feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def export_student(work, comfyui, timesteps):
    """Write the teacher's checkpoint, a LoRA student, its two exports, and the student's own latents and image."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from wadi import roles
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.exports.single_file import checkpoint
    from wadi.exports.source import Source
    from wadi.exports.write import export
    from wadi.pipelines.load import load

    make_teacher(comfyui, work / "teacher")
    backbone = from_pipeline(load_pipeline(work / "teacher"))
    save_file(
        {name: tensor.contiguous() for name, tensor in checkpoint(backbone.pipeline).items()}, work / "teacher.safetensors"
    )
    roles.attach(backbone.network, "student", LoraConfig(r=4, lora_alpha=8, target_modules=backbone.student_targets))
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters(backbone.network, "student").values():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    about = {"timesteps": timesteps, "teacher": str(work / "teacher")}
    roles.save(backbone.network, "student", work / "adapter", extra=about)
    del backbone
    for to in ("single-file", "lora"):
        export(Source(adapter=str(work / "adapter"), images=1), to, work / to)
    pipeline = load(adapter=work / "adapter")
    call = {"num_inference_steps": len(timesteps), "guidance_scale": 0.0}
    latents = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="latent", **call).images
    torch.save(latents, work / "latents.pt")
    pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **call).images[0].save(work / "image.png")


def run_in_comfyui(work, to):
    """Generate with ComfyUI, whose modules are on the path, and print the differences."""
    sys.argv = ["main.py", "--cpu", "--force-fp32", "--base-directory", str(work / "comfyui")]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.k_diffusion.sampling
    import execution
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    workflow = json.loads((work / to / "comfyui" / "workflow.json").read_text())
    for node in workflow.values():
        node["inputs"] |= {key: value for key, value in (("text", PROMPT), ("noise_seed", SEED)) if key in node["inputs"]}
    valid, error, _, errors = asyncio.run(execution.validate_prompt("0", workflow, None))
    print(f"{to}: ComfyUI finds the workflow {'valid' if valid else f'invalid: {error} {errors}'}")
    generator = torch.Generator().manual_seed(SEED)

    def like_diffusers(x, **_):
        torch.randn(x.shape, generator=generator)  # the first noise
        return lambda *_: torch.randn(x.shape, generator=generator)

    comfy.k_diffusion.sampling.default_noise_sampler = like_diffusers
    outputs = {}
    with torch.inference_mode():
        for name, node in workflow.items():
            if node["class_type"] != "SaveImage":
                outputs[name] = _run_node(nodes.NODE_CLASS_MAPPINGS[node["class_type"]], node["inputs"], outputs)
    by_class = {node["class_type"]: outputs.get(name) for name, node in workflow.items()}
    latents, own = SCALE * by_class["SamplerCustomAdvanced"][0]["samples"], torch.load(work / "latents.pt", weights_only=True)
    print(f"  latents: {float((latents - own).norm() / own.norm()):.1e} of their length")
    image = (255 * by_class["VAEDecode"][0][0].clamp(0, 1)).round().numpy().astype(int)
    change = np.abs(image - np.asarray(Image.open(work / "image.png")).astype(int))
    print(f"  image: mean {change.mean():.1e} and at most {change.max()} of 255")


def _run_node(node_class, inputs, outputs):
    values = {key: outputs[value[0]][value[1]] if isinstance(value, list) else value for key, value in inputs.items()}
    if hasattr(node_class, "define_schema"):
        return node_class.execute(**values).result
    return getattr(node_class(), node_class.FUNCTION)(**values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[800], help="of the student")
    parser.add_argument("--work", type=Path, help="folder for 20 GB of files; default: a temporary one")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_in_comfyui(options.work, options.run)
        return
    comfyui = options.comfyui.resolve()
    print("ComfyUI", (comfyui / "comfyui_version.py").read_text().split('"')[1])
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        export_student(work, comfyui, options.timesteps)
        models = work / "comfyui" / "models"
        for path, source in (
            ("checkpoints/model.safetensors", "single-file/model.safetensors"),
            ("checkpoints/teacher.safetensors", "teacher.safetensors"),
            ("loras/lora.safetensors", "lora/comfyui/lora.safetensors"),
        ):
            (models / path).parent.mkdir(parents=True, exist_ok=True)
            (models / path).symlink_to(work / source)
        for to in ("single-file", "lora"):
            path = os.pathsep.join([str(comfyui), *filter(None, [os.environ.get("PYTHONPATH")])])
            argv = [sys.executable, __file__, str(comfyui), "--work", str(work), "--run", to]
            subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, check=True)


if __name__ == "__main__":
    main()
