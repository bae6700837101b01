"""Run a distillation step of a public model at its real size, and compare its memory with the plan.

The weights are random. The network is built from its public config (`wadi plan` has them), and its conditions are random too.
The text encoder and the autoencoder take part in no step, so they are left out. Gradient checkpointing is on. Time and memory
do not depend on the weights.

    python bench/real_size.py --model sd15 --steps 1
    python bench/real_size.py --model sd15 --memory                 # of the second step; slower
    python bench/real_size.py --model sdxl --batch 4 --device cuda
    python bench/real_size.py --model sd15 --small                  # a small network, to test this script
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from machine import machine


def small(network: dict) -> dict:
    """Return the same architecture with a fraction of its width and depth."""
    if network["_class_name"] == "UNet2DConditionModel":
        heads = network["attention_head_dim"]
        widths = [32 * (i + 1) for i in range(len(network["block_out_channels"]))]
        heads = heads if isinstance(heads, int) else [2] * len(heads)
        return {**network, "block_out_channels": widths, "attention_head_dim": heads, "sample_size": 16, "layers_per_block": 1}
    return {**network, "num_layers": 2}


def give_freed_memory_back() -> None:
    """Make glibc return each large block as it is freed, so that resident memory is the live memory, as on a GPU."""
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD, no longer moving


class Peak:
    """Largest resident memory since the start of the block in GiB (Linux), or the peak of CUDA's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            self.gib = int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15", help="a preset of `wadi plan`")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the first one also allocates the optimisers' moments")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory", action="store_true", help="on a CPU: give memory back as it is freed, so that the peak is exact"
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, default=None, help="file to write the values to")
    args = parser.parse_args()

    from wadi.backbones import Condition, family
    from wadi.backbones.condition import sizes_and_dtype
    from wadi.backbones.configs import build_network
    from wadi.backbones.outline import Outline
    from wadi.diffusion.schedulers import make_scheduler
    from wadi.distill.batch import Batch
    from wadi.distill.objectives import make_objective, with_defaults
    from wadi.distill.optimizers import initial_state
    from wadi.distill.plan.architecture import load_architecture
    from wadi.distill.plan.plan import plan_run
    from wadi.distill.presets import preset
    from wadi.distill.setup import attach_roles
    from wadi.distill.step import as_numbers, train_step
    from wadi.sampling import student_timesteps

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = replace(with_defaults(preset(args.model)), batch=args.batch, dtype=args.dtype, gradient_checkpointing=True)
    architecture = load_architecture(args.model)
    if args.small:
        rank = {"student": replace(config.student, rank=16), "fake": replace(config.fake, rank=4)}
        config, architecture = replace(config, **rank), replace(architecture, network=small(architecture.network))

    if args.memory and device.type == "cpu":
        give_freed_memory_back()
    backbone_class = family(architecture.pipeline)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so the weights never exist in float32
    network = build_network(architecture.network).to(device)
    torch.set_default_dtype(before)
    scheduler, scale = make_scheduler(architecture.scheduler), architecture.vae_scale_factor
    parts = Outline(
        pipeline_class=architecture.pipeline,
        scheduler=scheduler,
        vae_scale_factor=scale,
        config={},
        **{backbone_class.component: network},
    )
    backbone = backbone_class(parts)
    attach_roles(backbone, config)
    timesteps, state = student_timesteps(backbone, config.student.timesteps), initial_state(network, config, device)
    objective = make_objective(config)
    rows = {name: sizes_and_dtype(shape) for name, shape in backbone.condition_shapes().items()}
    row = {name: torch.ones(1, *sizes, dtype=dtype, device=device) for name, (sizes, dtype) in rows.items()}
    null, condition = (
        Condition(row),
        Condition({name: tensor.repeat(args.batch, *[1] * (tensor.ndim - 1)) for name, tensor in row.items()}),
    )
    z = torch.randn(args.batch, *backbone.latent_shape, device=device)
    batch = Batch(condition, null, z, z[:0])

    with Peak(device) as peak:
        pass
    weights_gib = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) / 2**30
    libraries_gib = peak.gib - weights_gib  # memory of the interpreter and the libraries
    seconds, peaks = [], []
    for _ in range(args.steps):
        with Peak(device) as peak:
            start = time.perf_counter()
            stats = as_numbers(train_step(backbone, batch, timesteps, objective, config, state), network)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        state.step += 1
        peaks.append(peak.gib)
        print(
            f"step {state.step}: {seconds[-1]:.1f} s, peak {peak.gib:.2f} GiB, fake loss {stats['loss_fake']:.3f}", flush=True
        )
    planned = plan_run(config, architecture)
    memory = planned.memory["checkpointed"]
    expected = (memory.known - memory.encoders) / 2**30
    size = f"{planned.parameters / 1e6:.1f} M parameters, rank {config.student.rank} and {config.fake.rank}"
    print(f"{architecture.model}, {size}, batch {args.batch}, latents {backbone.latent_shape}, {args.dtype}")
    print(f"last step {seconds[-1]:.1f} s ({args.batch / seconds[-1]:.3f} images/s)")
    print(f"peak {max(peaks):.2f} GiB, of which libraries take {libraries_gib:.2f}; the plan said {expected:.2f} for the rest")
    print(machine(args.device))
    if args.json:
        values = vars(args) | {
            "json": None,
            "seconds": seconds,
            "peak_gib": peaks,
            "planned_gib": expected,
            "empty_gib": libraries_gib,
            "machine": machine(args.device),
        }
        args.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
