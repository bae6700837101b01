"""Compare one distillation step with the released layout and with the cost of its network passes alone, in one run.

    floor      only the passes that cannot be avoided: student and fake forward + backward, with the adapted layers' weights
               trainable in place of angles; guided passes of teacher and fake model without gradient
    wadi       this package's training step: one frozen network, two sets of angles, conditional and null in one batch
    released   three copies, forward hooks, separate conditional and null passes (bench/released.py); same losses

Any other layout is a step of this package, by adapter and objective: ``lora``, ``lorad/sid``, ``lorad/dmd2+gan``. One without
an objective has ``vsd``, as ``wadi`` has. Objectives have one update of the fake model, so that their steps can be compared.

Each layout runs in a process of its own, because peak memory belongs to a process. The layouts take turns in each round, so a
slow machine affects all of them alike. Parameters are random: time and memory do not depend on them. --json also writes a
file.

    python bench/step.py --size zoo --threads 2
    python bench/step.py --size sd15 --batch 4 --dtype bfloat16 --device cuda
    python bench/step.py --size zoo --threads 1 --layouts floor wadi lora lorad/sid
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing as mp
import statistics
import time
from typing import Any

import torch

from machine import machine, peak_rss_mib
from released import guided_separately, hook

# U-Nets to build from: the embedded teacher's shape, a mid one, and SD 1.5's.
UNETS: dict[str, dict[str, Any]] = {
    "zoo": {
        "sample_size": 16, "in_channels": 12, "out_channels": 12, "layers_per_block": 1, "block_out_channels": (96, 128, 192),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 192, "attention_head_dim": 4,
    },
    "wide": {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (128, 256, 512),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 512, "attention_head_dim": 8,
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
}  # fmt: skip
TOKENS = {"zoo": 24, "wide": 77, "sd15": 77}
LAYOUTS = ("floor", "wadi", "released")
OPTIONS = {"oft": {"oft_block_size": 32}, "boft": {"boft_block_size": 32}, "road": {"group_size": 32}}  # that divide all layers


class Rig:
    """A random Stable Diffusion U-Net as a backbone, with fixed random conditions."""

    def __init__(self, args: argparse.Namespace) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel

        from wadi.backbones.condition import Condition
        from wadi.backbones.outline import Outline
        from wadi.backbones.sd import StableDiffusion

        torch.manual_seed(0)
        shape = UNETS[args.size]
        unet = UNet2DConditionModel(**shape).to(args.device, getattr(torch, args.dtype)).eval().requires_grad_(False)
        scheduler = DDIMScheduler(beta_schedule="scaled_linear")
        parts = Outline(pipeline_class="StableDiffusionPipeline", unet=unet, scheduler=scheduler, vae_scale_factor=8, config={})
        self.backbone = StableDiffusion(parts)
        width = (TOKENS[args.size], shape["cross_attention_dim"])
        self.condition = Condition({"prompt_embeds": torch.randn(args.batch, *width, device=args.device)})
        self.null = Condition({"prompt_embeds": torch.randn(1, *width, device=args.device)})
        self.z = torch.randn(args.batch, *self.backbone.latent_shape, device=args.device)


def build(layout: str, args: argparse.Namespace) -> Any:
    """Return a function that runs one step of ``layout``, and the bytes of its parameters."""
    rig, config = Rig(args), settings(layout, args)
    if layout == "floor":
        return floor(rig, config), size_of(rig.backbone.network)
    if layout == "released":
        return released(rig, config)
    return wadi_step(rig, config, torch.device(args.device)), size_of(rig.backbone.network)


def settings(layout: str, args: argparse.Namespace) -> Any:
    """Return the settings of a layout, with the objective's defaults filled in."""
    from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
    from wadi.distill.objectives import with_defaults

    adapter, _, objective = layout.partition("/") if layout not in LAYOUTS else ("lorad", "", "vsd")
    name, _, gan = (objective or "vsd").partition("+")
    both: Any = {"adapter": adapter, "lr": 1e-6, "adapter_options": OPTIONS.get(adapter, {})}
    return with_defaults(
        DistillConfig(
            batch=args.batch,
            dtype=args.dtype,
            objective=name,
            objective_options={"gan_weight": 0.1} if gan else {},
            student=StudentConfig(rank=args.rank, **both),
            fake=FakeConfig(rank=args.fake_rank, updates=1, **both),
        )
    )


def wadi_step(rig: Rig, config: Any, device: torch.device) -> Any:
    """Return a training step of this package."""
    from wadi.distill.batch import Batch
    from wadi.distill.objectives import make_objective
    from wadi.distill.optimizers import initial_state
    from wadi.distill.setup import attach_roles
    from wadi.distill.step import as_numbers, train_step

    backbone, network = rig.backbone, rig.backbone.network
    attach_roles(backbone, config)
    objective = make_objective(config)
    objective.build(backbone)
    objective.modules.to(device)
    state = initial_state(network, config, device, objective=objective)
    samples = (torch.randn_like(rig.z), rig.condition) if objective.needs_samples else ()
    batch = Batch(rig.condition, rig.null, rig.z, rig.z[:0], 0, *samples)
    return lambda: as_numbers(train_step(backbone, batch, [999], objective, config, state), network)


def size_of(*networks: torch.nn.Module) -> int:
    """Return the bytes of parameters, with shared ones counted once."""
    sizes = {p.data_ptr(): p.numel() * p.element_size() for network in networks for p in network.parameters()}
    return sum(sizes.values())


def floor(rig: Rig, config: Any) -> Any:
    """Return a step of the network passes alone, which every implementation has to pay."""
    from wadi.sampling import one_step, predict_guided

    backbone, network = rig.backbone, rig.backbone.network

    def trainable(targets: str) -> list[torch.nn.Parameter]:
        import re

        network.requires_grad_(False)
        chosen = [m.weight for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(targets, n)]
        for weight in chosen:
            weight.requires_grad_(True)
        return chosen

    student, fake = trainable(backbone.student_targets), trainable(backbone.fake_targets)

    def switch(on: list[torch.nn.Parameter]) -> None:
        network.requires_grad_(False)
        for weight in on:
            weight.requires_grad_(True)

    def step() -> None:
        t = torch.randint(20, 980, (len(rig.z),), device=rig.z.device)
        switch(student)
        x0 = one_step(backbone, rig.condition, rig.z, 999)
        with torch.no_grad():
            predict_guided(backbone, x0, t, rig.condition, rig.null, config.guidance_scale)
            predict_guided(backbone, x0, t, rig.condition, rig.null, config.fake.guidance_scale)
        x0.square().mean().backward()
        switch(fake)
        backbone.predict(x0.detach(), t, rig.condition).square().mean().backward()
        for weight in (*student, *fake):
            weight.grad = None

    return step


def released(rig: Rig, config: Any) -> Any:
    """Return the same step in the layout of the released scripts."""
    from wadi.distill.objectives.denoise import denoising_loss
    from wadi.distill.objectives.score import gradient_loss, vsd_gradient
    from wadi.sampling import one_step

    teacher = rig.backbone
    student, fake = copy.copy(teacher), copy.copy(teacher)
    student.network, fake.network = copy.deepcopy(teacher.network), copy.deepcopy(teacher.network)
    angles = {
        "student": hook(student.network, teacher.student_targets, config.student.rank),
        "fake": hook(fake.network, teacher.fake_targets, config.fake.rank),
    }
    optimizers = {role: torch.optim.AdamW(parameters, lr=1e-6) for role, parameters in angles.items()}
    null = rig.null.expand(len(rig.z))

    def update(role: str, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(angles[role], 1.0)
        optimizers[role].step()
        optimizers[role].zero_grad(set_to_none=True)

    def step() -> None:
        t = torch.randint(20, 980, (len(rig.z),), device=rig.z.device)
        x0 = one_step(student, rig.condition, rig.z, 999)
        with torch.no_grad():
            x_t = teacher.process.add_noise(x0, torch.randn_like(x0), t)
            real = guided_separately(teacher.predict, x_t, t, rig.condition, null, config.guidance_scale)
            copied = guided_separately(fake.predict, x_t, t, rig.condition, null, config.fake.guidance_scale)
            gradient = vsd_gradient(x_t, t, real, copied, teacher.process)
        update("student", gradient_loss(x0, gradient))
        clean, noise = x0.detach(), torch.randn_like(x0)
        x_t = teacher.process.add_noise(clean, noise, t)
        prediction = fake.predict(x_t, t, rig.condition)
        update("fake", denoising_loss(prediction, clean, noise, x_t, t, teacher.process))

    networks = (teacher.network, student.network, fake.network)
    extra = sum(p.numel() * p.element_size() for parameters in angles.values() for p in parameters)
    return step, size_of(*networks) + extra


def serve(layout: str, args: argparse.Namespace, pipe: Any) -> None:
    """Set up in a child process, then time one step for each "go"."""
    torch.set_num_threads(args.threads)
    built = build(layout, args)
    step, parameter_bytes = built
    cuda = args.device.startswith("cuda")
    step()
    pipe.send("ready")
    while pipe.recv() == "go":
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_rss_mib()
    pipe.send({"peak_mib": peak, "parameters_mib": parameter_bytes / 2**20})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all layouts in turn, ``args.rounds`` times."""
    context = mp.get_context("spawn")
    workers, times = {}, {layout: [] for layout in args.layouts}
    for layout in args.layouts:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(layout, args, there), daemon=True)
        process.start()
        assert here.recv() == "ready"
        workers[layout] = (process, here)
    for _ in range(args.rounds):
        for layout, (_, pipe) in workers.items():
            pipe.send("go")
            times[layout].append(pipe.recv())
    result: dict[str, Any] = {"machine": machine(args.device), "settings": vars(args), "layouts": {}}
    for layout, (process, pipe) in workers.items():
        pipe.send("stop")
        result["layouts"][layout] = pipe.recv() | {"seconds": times[layout]}
        process.join()
    return result


def table(result: dict[str, Any]) -> str:
    """Return Markdown: seconds, the ratio to the floor of the same round, both as median (quartiles), and memory."""
    lines = [
        "| layout | seconds a step (quartiles) | x floor (quartiles) | parameters MiB | peak MiB |",
        "|---|---|---|---|---|",
    ]
    base = next(iter(result["layouts"].values()))["seconds"]
    for layout, row in result["layouts"].items():
        ratios = [seconds / floor for seconds, floor in zip(row["seconds"], base, strict=True)]
        time_, ratio = (spread(values) for values in (row["seconds"], ratios))
        lines.append(f"| {layout} | {time_} | {ratio} | {row['parameters_mib']:.0f} | {row['peak_mib']:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return the median and the quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=UNETS, default="zoo")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--fake_rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help="which to compare; the first must be the floor")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    result = run(args)
    print(f"{result['machine']}; {args.size}, batch {args.batch}, ranks {args.rank}/{args.fake_rank}, {args.dtype}\n")
    print(table(result))
    if args.json:
        with open(args.json, "w") as stream:
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    main()
