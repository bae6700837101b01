"""Measure time and memory of precision, recall, density and coverage at the size of COCO's protocol.

python bench/neighbours.py --images 30000 --dimensions 64
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from machine import machine, peak_rss_mib
from wadi.metrics.neighbours import BLOCK, prdc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30000, help="in each of the two sets")
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--json", type=Path, help="file to write the values to")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(args.images, args.dimensions, generator=generator) for _ in range(2))
    before, start = peak_rss_mib(), time.perf_counter()
    metrics = prdc(real, 0.9 * fake, block=args.block)
    values = {
        "images": args.images,
        "dimensions": args.dimensions,
        "block": args.block,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib_before": round(before),
        "peak_mib": round(peak_rss_mib()),
        "table_mib": round(args.images**2 * 8 / 2**20),
        **asdict(metrics),
        "machine": machine(),
    }
    print(json.dumps(values, indent=1))
    if args.json:
        args.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
