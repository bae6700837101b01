"""A distillation step of a public model at its real size, with random weights: seconds, peak memory, and what the plan said.

The network is built from its public config (`wadi plan` has them), its conditions are random, and there is no text encoder and
no autoencoder: they take part in no step. Gradient checkpointing is on. Time and memory do not depend on the weights.

    python bench/real_size.py --model sd15 --steps 1
    python bench/real_size.py --model sd15 --memory                 # of the second step; slower
    python bench/real_size.py --model sdxl --batch 4 --device cuda
    python bench/real_size.py --model sd15 --small                  # two blocks a level: does the script itself work
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
    """The same architecture at a fraction of its width and depth."""
    if network["_class_name"] == "UNet2DConditionModel":
        heads = network["attention_head_dim"]
        widths = [32 * (i + 1) for i in range(len(network["block_out_channels"]))]
        heads = heads if isinstance(heads, int) else [2] * len(heads)
        return {**network, "block_out_channels": widths, "attention_head_dim": heads, "sample_size": 16, "layers_per_block": 1}
    return {**network, "num_layers": 2}


def give_freed_memory_back() -> None:
    """Have glibc return each large block as it is freed: resident memory is then what is alive, as on a GPU."""
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD, no longer moving


class Peak:
    """Largest resident memory since the start of the block in GiB (Linux), or what CUDA's allocator held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
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
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    args = parser.parse_args()

    from wadi.backbones import Condition, family
    from wadi.backbones.configs import build_network
    from wadi.backbones.outline import Outline
    from wadi.diffusion.schedulers import make_scheduler
    from wadi.distill.batch import Batch
    from wadi.distill.optimizers import initial_state
    from wadi.distill.plan import plan
    from wadi.distill.presets import preset
    from wadi.distill.setup import attach_roles
    from wadi.distill.step import train_step
    from wadi.sampling import student_timestep

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = replace(preset(args.model), batch=args.batch, dtype=args.dtype, gradient_checkpointing=True)
    found = plan.architecture(args.model)
    if args.small:
        rank = {"student": replace(config.student, rank=16), "fake": replace(config.fake, rank=4)}
        config, found = replace(config, **rank), replace(found, network=small(found.network))

    if args.memory and device.type == "cpu":
        give_freed_memory_back()
    kind = family(found.pipeline)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never a copy of the weights in float32
    network = build_network(found.network).to(device)
    torch.set_default_dtype(before)
    scheduler, scale = make_scheduler(found.scheduler), found.vae_scale_factor
    parts = Outline(
        pipeline_class=found.pipeline, scheduler=scheduler, vae_scale_factor=scale, config={}, **{kind.component: network}
    )
    backbone = kind(parts)
    attach_roles(backbone, config)
    timestep, state = student_timestep(backbone, config.student.timestep), initial_state(network, config, device)
    row = {name: torch.ones(1, *shape, device=device) for name, shape in backbone.condition_shapes().items()}
    null, condition = (
        Condition(row),
        Condition({name: tensor.repeat(args.batch, *[1] * (tensor.ndim - 1)) for name, tensor in row.items()}),
    )
    z = torch.randn(args.batch, *backbone.latent_shape, device=device)

    with Peak(device) as peak:
        pass
    held = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) / 2**30
    empty = peak.gib - held  # what the interpreter and the libraries take
    seconds, peaks = [], []
    for _ in range(args.steps):
        with Peak(device) as peak:
            start = time.perf_counter()
            stats = train_step(backbone, Batch(condition, null, z, z[:0]), timestep, config, state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        state.step += 1
        peaks.append(peak.gib)
        print(
            f"step {state.step}: {seconds[-1]:.1f} s, peak {peak.gib:.2f} GiB, fake loss {stats['loss_fake']:.3f}", flush=True
        )
    planned = plan.plan(config, found)
    memory = planned.memory["checkpointed"]
    expected = (memory.total - memory.encoders) / 2**30
    size = f"{planned.parameters / 1e6:.1f} M parameters, rank {config.student.rank} and {config.fake.rank}"
    print(f"{found.model}, {size}, batch {args.batch}, latents {backbone.latent_shape}, {args.dtype}")
    print(f"last step {seconds[-1]:.1f} s ({args.batch / seconds[-1]:.3f} images/s)")
    print(f"peak {max(peaks):.2f} GiB, of it {empty:.2f} the libraries' own; the plan said {expected:.2f} for the rest")
    print(machine(args.device))
    if args.json:
        values = vars(args) | {
            "json": None,
            "seconds": seconds,
            "peak_gib": peaks,
            "planned_gib": expected,
            "empty_gib": empty,
            "machine": machine(args.device),
        }
        args.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
