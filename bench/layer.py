"""Measure one adapted linear layer, forward and backward: time relative to a trainable Linear, and memory for autograd.

    python bench/layer.py --size 640x640 --tokens 512 --rank 16 --json out.json

Every variant runs once in each round, in shuffled order. Its time is divided by the trainable Linear's time in the same round,
so a busy machine slows both. The output is the median ratio, the middle half of the rounds, and the bytes kept beyond
parameters and input in units of one weight W.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import nn

from wadi.lorad import LoRaDConfig

REFERENCE = "trainable Linear"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class ReleasedLayout(nn.Module):
    """The layout of the authors' scripts.

    A forward hook rotates with plain autograd operations and multiplies again, after the frozen layer's own product.
    """

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(linear.out_features, r))
        self.B = nn.Parameter(nn.init.xavier_uniform_(torch.empty(r, linear.in_features // 2)))
        linear.register_forward_hook(self.rotate)

    def rotate(self, linear, args, _output):
        theta = torch.remainder(self.A @ self.B + torch.pi, 2 * torch.pi) - torch.pi
        cos, sin, W = theta.cos(), theta.sin(), linear.weight
        R = torch.empty_like(W)
        R[:, 0::2] = W[:, 0::2] * cos - W[:, 1::2] * sin
        R[:, 1::2] = W[:, 0::2] * sin + W[:, 1::2] * cos
        return F.linear(args[0], R.to(args[0].dtype), linear.bias)

    def forward(self, x):
        return self.linear(x)


def variants(linear: nn.Linear, r: int) -> dict[str, nn.Module]:
    """Return all layers to be timed, each with a copy of ``linear``."""

    def adapted(config):
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
        return model.base_model.model[0]

    target = {"target_modules": ["0"]}
    return {
        REFERENCE: copy.deepcopy(linear),
        "frozen Linear": copy.deepcopy(linear).requires_grad_(False),
        "**LoRaD**": adapted(LoRaDConfig(r=r, **target)),
        "**LoRaD, recompute**": adapted(LoRaDConfig(r=r, recompute=True, **target)),
        "LoRaD, released layout": ReleasedLayout(copy.deepcopy(linear), r),
        "LoRA": adapted(peft.LoraConfig(r=r, **target)),
        "DoRA": adapted(peft.LoraConfig(r=r, use_dora=True, **target)),
        "OFT (block 32)": adapted(peft.OFTConfig(r=0, oft_block_size=32, **target)),
        "BOFT (block 32)": adapted(peft.BOFTConfig(boft_block_size=32, **target)),
        "HRA": adapted(peft.HRAConfig(r=r, **target)),
        "RoAd": adapted(peft.RoadConfig(group_size=64, **target)),
    }


def bytes_kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that autograd keeps for one forward pass, without parameters, buffers and the input."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(size for address, size in kept.items() if address not in known)


def seconds(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, clock: Callable[[], float]) -> float:
    """Time one forward and backward pass, with gradients of parameters and input."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    if x.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    layer(x).backward(g)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(out: int, fan_in: int, tokens: int, rank: int, args: argparse.Namespace) -> list[dict]:
    """Return a row for each variant of one layer size."""
    dtype, clock = getattr(torch, args.dtype), CLOCKS[args.clock]
    torch.manual_seed(0)
    linear = nn.Linear(fan_in, out).to(args.device, dtype)
    layers = {name: layer.to(args.device) for name, layer in variants(linear, rank).items()}
    x = torch.randn(tokens, fan_in, device=args.device, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, out, device=args.device, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(args.rounds + 2):
        order = list(layers)
        random.shuffle(order)
        for name in order:
            times[name].append(seconds(layers[name], x, g, clock))
    rows = []
    for name, layer in layers.items():
        ratios = [t / ref for t, ref in zip(times[name][2:], times[REFERENCE][2:], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "layer": name, "out": out, "fan_in": fan_in, "tokens": tokens, "rank": rank,
                "ratio": median, "ratio_low": low, "ratio_high": high,
                "ms": 1e3 * statistics.median(times[name][2:]),
                "kept_over_W": bytes_kept(layer, x) / (linear.weight.numel() * linear.weight.element_size()),
                "trained": sum(p.numel() for p in layer.parameters() if p.requires_grad),
            }
        )  # fmt: skip
    return rows


def machine(args: argparse.Namespace) -> dict:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if "model name" in s), name)
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    settings = {name: getattr(args, name) for name in ("device", "dtype", "clock", "rounds", "threads")}
    packages = {name: version(name) for name in ("torch", "peft")}
    return {"machine": name, "python": platform.python_version(), **packages, **settings}


def markdown(rows: list[dict], about: dict) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    keys = ("out", "fan_in", "tokens", "rank")
    columns = ["layer", "time / trainable Linear", "middle half", "ms", "kept / W", "trained"]
    for case in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        lines += ["Linear {1} -> {0}, {2} tokens, rank {3}:".format(*case), ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            "| {layer} | {ratio:.2f} | {ratio_low:.2f} - {ratio_high:.2f} | {ms:.1f} | {kept_over_W:.2f} "
            "| {trained:,} |".format(**row)
            for row in rows
            if tuple(row[k] for k in keys) == case
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["640x640"], help="fan-out x fan-in, e.g. 640x640 1280x320")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--rank", nargs="+", type=int, default=[16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: processor time, for a busy machine")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0)
    sizes = [tuple(int(n) for n in size.split("x")) for size in args.size]
    cases = [(o, i, tokens, rank) for o, i in sizes for tokens in args.tokens for rank in args.rank]
    rows = [row for case in cases for row in measure(*case, args)]
    about = machine(args)
    print(markdown(rows, about))
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
