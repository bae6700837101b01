"""Presets: readable tables of settings. Every value can be overridden by YAML and on the command line."""

from __future__ import annotations

from dataclasses import replace

from wadi.config import DistillConfig, FakeConfig, StudentConfig, WarmStartConfig
from wadi.errors import WadiError

# The paper's settings (section 3 of the paper's experiments): AdamW, constant schedule, guidance 1.5 on teacher and fake model,
# sigma_t^2 weighting, t* = T - 1. Batch is per process: the paper's 128 are 16 on each of 8 GPUs, and 21 875 steps are two
# epochs of its 1.4 M prompts.
PAPER = DistillConfig(
    steps=21_875,
    batch=16,
    dtype="bfloat16",
    guidance_scale=1.5,
    gradient_checkpointing=True,
    student=StudentConfig(rank=256, lr=1e-4, weighting="sigma2"),
    fake=FakeConfig(rank=32, lr=1e-2, guidance_scale=1.5, updates=1, weighting="alpha2"),
)

# The embedded teacher in minutes on two cores. Against the paper's: an earlier t*, DMD's normalised gradient, no guidance on
# the fake model, a warm start: docs/zoo.md has what each of them is worth.
DEMO = DistillConfig(
    teacher="zoo",
    prompts="zoo",
    steps=300,
    batch=16,
    guidance_scale=2.0,
    lr_schedule="cosine",
    lr_warmup=10,
    student=StudentConfig(rank=64, lr=1.5e-3, weighting="dmd", timestep=800),
    fake=FakeConfig(rank=16, lr=3e-3, guidance_scale=1.0, updates=2, weighting="none"),
    warm_start=WarmStartConfig(pairs=384, sampler_steps=12, guidance_scale=2.0, steps=100, fake_steps=30, weight=0.25),
    sample_every=50,
    checkpoint_every=100,
    teacher_guidance_scale=2.0,
)

PRESETS: dict[str, DistillConfig] = {
    "demo": DEMO,
    "zoo": replace(DEMO, steps=2000, warm_start=replace(DEMO.warm_start, pairs=2048, steps=600), sample_every=200),
    "zoo-paper": replace(
        PAPER,
        teacher="zoo",
        prompts="zoo",
        steps=300,
        dtype="float32",
        gradient_checkpointing=False,
        student=replace(PAPER.student, rank=64, lr=1e-3),
        fake=replace(PAPER.fake, rank=16),
        sample_every=50,
        teacher_guidance_scale=2.0,
    ),
    "sd15": PAPER,
}


def preset(name: str) -> DistillConfig:
    """The preset of that name.

    Raises:
        WadiError: if there is none.
    """
    if name not in PRESETS:
        raise WadiError(f"There is no preset {name!r}. Expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]
