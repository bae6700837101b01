"""Presets: readable tables of settings. YAML files and the command line can override every value."""

from __future__ import annotations

from dataclasses import replace

from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig, WarmStartConfig
from wadi.errors import WadiError

ZOO_PROMPTS = (
    "red apple",
    "penguin, on a pink background",
    "hamburger, on a yellow background",
    "fox, noto style, on a purple background",
    "sunflower, twemoji style, on a green background",
    "strawberry, fluent style, on a white background",
    "sailboat, twemoji style",
    "pizza, noto style, on a blue background",
)
UNET_LINEAR_AND_CONV = (
    r"(down_blocks|mid_block|up_blocks)\..*"
    r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|time_emb_proj|conv|conv1|conv2|conv_shortcut)"
)

# The paper's settings (its section on experiments): AdamW, constant schedule, guidance 1.5 for teacher and fake model,
# sigma_t^2 weighting, t* = T - 1. The batch is per process: the paper's 128 images are 16 on each of 8 GPUs. 21 875 steps are
# two epochs of its 1.4 M prompts. The objective 'vsd' sets guidance 1.5, one update and alpha weighting for the fake model.
PAPER = DistillConfig(
    steps=21_875,
    batch=16,
    dtype="bfloat16",
    guidance_scale=1.5,
    gradient_checkpointing=True,
    student=StudentConfig(rank=256, lr=1e-4),
    fake=FakeConfig(rank=32, lr=1e-2),
)

# The embedded teacher in minutes on two cores. Differences from the paper: convolutions get angles too (they hold most of this
# network's weights), t* is earlier, the gradient is DMD's normalised one, the fake model has no guidance, and the student has a
# warm start.
DEMO = DistillConfig(
    teacher="zoo",
    prompts="zoo",
    steps=225,
    batch=16,
    objective="dmd",
    guidance_scale=2.5,
    lr_schedule="cosine",
    lr_warmup=10,
    student=StudentConfig(rank=64, target_modules=UNET_LINEAR_AND_CONV, lr=5e-3, timesteps=(800,)),
    fake=FakeConfig(rank=16, lr=3e-3, updates=2),
    warm_start=WarmStartConfig(pairs=320, sampler_steps=10, guidance_scale=2.5, steps=130, fake_steps=20, weight=0.5),
    sample_every=75,
    sample_prompts=ZOO_PROMPTS,
    checkpoint_every=100,
    teacher_guidance_scale=2.5,
)

# The models of the paper. Where the network predicts noise, the student's image multiplies an error of the network by
# sigma / alpha = 14.6. Stable Diffusion's schedule gives this factor at t = 999; for every other schedule the authors' code
# gives it by the constant alpha_T^2 = 0.0047.
PAPERS = {
    # t* = 999, the last timestep, and float16 with loss scaling, both as in the paper. bfloat16 would need no scaling.
    "sd15": replace(PAPER, dtype="float16"),
    "sd21-base": replace(PAPER, dtype="float16"),
    # t* = 999. v-prediction does not divide by alpha: an error is multiplied by sigma = 1.0. The paper's loss of the fake model
    # is written for epsilon; for v it would weigh noisy timesteps by alpha^4, so we take the plain error of v.
    "sd21": replace(PAPER, dtype="float16", fake=replace(PAPER.fake, weighting="none")),
    # t* = 727. At 999 the linear schedule multiplies errors by 157. At 727 its own alpha^2 is 0.0047, the constant that the
    # authors use at 999. So the student's step equals theirs, and alpha comes from the schedule.
    "pixart-alpha-256": replace(PAPER, student=replace(PAPER.student, rank=128, timesteps=(727,))),
    "pixart-alpha-512": replace(PAPER, student=replace(PAPER.student, rank=128, timesteps=(727,))),
}

# Models that the paper does not cover. These settings are reasoned, not run at full size. One-step distillations of the larger
# models (DMD2) share DMD's normalised gradient and an unguided fake model that is updated more often than the student. The fake
# model's learning rate is lower because the plain loss has larger gradients than the paper's alpha^2 loss.
_OURS = replace(
    PAPER,
    batch=8,
    objective="dmd",
    fake=replace(PAPER.fake, lr=1e-3, updates=5),
)
OURS = {
    # t* = 399 (an error is multiplied by 1.2), as for DMD2's SDXL student: one step of SDXL at 999 leaves noise in the image.
    # From pure noise at 399 the teacher itself generates nothing, so the student starts on the teacher's own images.
    "sdxl": replace(
        _OURS,
        guidance_scale=5.0,
        teacher_guidance_scale=5.0,
        student=replace(_OURS.student, timesteps=(399,)),
        warm_start=WarmStartConfig(pairs=10_000, sampler_steps=20, guidance_scale=5.0, steps=1000, fake_steps=200),
    ),
    # t* = 727, as for PixArt-alpha, which has the same schedule.
    "pixart-sigma": replace(
        _OURS,
        guidance_scale=3.0,
        teacher_guidance_scale=4.5,
        student=replace(_OURS.student, rank=128, timesteps=(727,)),
    ),
    # t* = 1000, the start of the flow (sigma = 1, an error is multiplied by 1). An earlier timestep has no advantage: at 1000
    # the model expects pure noise, which is the student's input.
    "sd3": replace(_OURS, guidance_scale=4.0, teacher_guidance_scale=4.5),
    # t* = 1000, for the same reason. FLUX.1 dev takes its guidance scale as an input; we pass 3.5 and add no guidance.
    "flux": replace(_OURS, batch=1, guidance_scale=1.0, teacher_guidance_scale=1.0, student=replace(_OURS.student, rank=128)),
    # t* = 1000, for the same reason.
    "sana": replace(_OURS, guidance_scale=4.5, teacher_guidance_scale=4.5),
    # t* = 1000, for the same reason. The guidance scale of 4 that its authors recommend counts from 0, so it is 5 here.
    "z-image": replace(
        _OURS, batch=1, guidance_scale=5.0, teacher_guidance_scale=5.0, student=replace(_OURS.student, rank=128)
    ),
    "lumina2": replace(_OURS, guidance_scale=4.0, teacher_guidance_scale=4.0),
    # FLUX.2 dev takes its guidance scale as an input; we pass 4 and add no guidance.
    "flux2": replace(_OURS, batch=1, guidance_scale=1.0, teacher_guidance_scale=1.0, student=replace(_OURS.student, rank=64)),
    "flux2-klein": replace(_OURS, batch=1, guidance_scale=4.0, teacher_guidance_scale=4.0),
    "qwen-image": replace(
        _OURS, batch=1, guidance_scale=4.0, teacher_guidance_scale=4.0, student=replace(_OURS.student, rank=128)
    ),
    "chroma": replace(_OURS, batch=1, guidance_scale=3.0, teacher_guidance_scale=3.0, student=replace(_OURS.student, rank=128)),
}

# A day on one GPU: four steps in place of one, by DMD2, with a student of lower rank. DMD2's SDXL model of four steps has these
# timesteps. Four steps forgive errors that one step shows, so fewer updates are enough. Reasoned, not run at full size.
_FOUR_STEPS = StudentConfig(rank=64, lr=1e-4, ema=0.99, timesteps=(999, 749, 499, 249))
ONE_GPU = {
    "sd15-one-gpu": replace(
        _OURS,
        objective="dmd2",
        steps=6000,
        batch=8,
        accumulate=4,
        gradient_checkpointing=False,
        guidance_scale=4.5,
        teacher_guidance_scale=7.5,
        student=_FOUR_STEPS,
        fake=replace(_OURS.fake, updates=2),
    ),
    "sdxl-one-gpu": replace(
        _OURS,
        objective="dmd2",
        steps=3000,
        batch=2,
        accumulate=8,
        guidance_scale=5.0,
        teacher_guidance_scale=5.0,
        student=_FOUR_STEPS,
        fake=replace(_OURS.fake, updates=2),
    ),
}
# The model that each preset is for.
MODELS = {**{name: name for name in (*PAPERS, *OURS)}, "sd15-one-gpu": "sd15", "sdxl-one-gpu": "sdxl"}

PRESETS: dict[str, DistillConfig] = {
    "demo": DEMO,
    # The embedded student: the demo's settings, five times as long, with a stronger pull towards the teacher's own images.
    "zoo": replace(
        DEMO,
        steps=1100,
        student=replace(DEMO.student, ema=0.98),
        warm_start=replace(DEMO.warm_start, pairs=2048, sampler_steps=12, steps=680, weight=1.0),
        sample_every=220,
        checkpoint_every=200,
    ),
    "zoo-paper": replace(
        PAPER,
        teacher="zoo",
        prompts="zoo",
        steps=260,
        dtype="float32",
        gradient_checkpointing=False,
        student=replace(PAPER.student, rank=64, target_modules=UNET_LINEAR_AND_CONV, lr=1e-3),
        fake=replace(PAPER.fake, rank=16),
        sample_every=65,
        sample_prompts=ZOO_PROMPTS,
        teacher_guidance_scale=2.5,
    ),
    **PAPERS,
    **OURS,
    **ONE_GPU,
}


def preset(name: str) -> DistillConfig:
    """Return the preset ``name``.

    Raises:
        WadiError: if it does not exist.
    """
    if name not in PRESETS:
        raise WadiError(f"There is no preset {name!r}. Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
