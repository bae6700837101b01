"""Train all weights of a one-step student of the embedded teacher, to see what training without LoRaD changes.

LoRaD keeps every norm by construction, so its students cannot show whether norms would have changed. This script trains every
weight by the warm start's regression, on pairs (noise, the teacher's sample) that a run of `wadi distill` has stored:

    python bench/full_student.py RUN/warm_start.safetensors --out full.safetensors
    wadi analyze zoo full.safetensors --out runs/analysis-full
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from wadi import zoo
from wadi.backbones import from_pipeline
from wadi.distill.objectives.regression import regression_loss
from wadi.distill.warm_start import load_pairs
from wadi.prompts.reading import open_prompts
from wadi.sampling import one_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--timestep", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time; the learning rate follows it")
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone, pairs = from_pipeline(zoo.load_teacher()), load_pairs(args.pairs, torch.device("cpu"))
    prompts = open_prompts("zoo")
    network = backbone.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.0)
    start, losses = time.monotonic(), []
    for step in range(args.steps):
        share = max(step / args.steps, (time.monotonic() - start) / args.seconds)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 10) * (1 - share)
        chosen = torch.randint(len(pairs.rows), (args.batch,))
        condition = backbone.encode([prompts[int(row)] for row in pairs.rows[chosen]])
        loss = regression_loss(one_step(backbone, condition, pairs.z[chosen], args.timestep), pairs.x0[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_file({name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}, args.out)
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    print(
        f"{len(losses)} steps in {time.monotonic() - start:.0f} s: loss {first:.3f} (first 20), "
        f"{last:.3f} (last 20): {args.out}"
    )


if __name__ == "__main__":
    main()
