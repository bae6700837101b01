"""The text of a plan, as ``wadi plan`` prints it."""

from __future__ import annotations

import re
from collections import Counter

from wadi.distill.plan.plan import Plan


def describe_plan(plan: Plan) -> str:
    """Return the plan as lines of text."""
    height, width = plan.resolution
    lines = [
        f"{plan.model}: {plan.parameters / 1e6:,.2f} M parameters, images of {height} x {width} pixels",
        f"student generates at t = {', '.join(map(str, plan.timesteps))}; at {plan.timesteps[0]} an error of the network is "
        f"multiplied by {plan.amplification:.1f}",
        "",
    ]
    for name, role in (("student", plan.student), ("fake model", plan.fake)):
        if role is None:
            continue
        share = role.parameters / plan.parameters
        rank = "" if role.rank is None else f" of rank {role.rank}"
        trained = f"{role.parameters:,} trainable ({share:.1%})"
        lines.append(f"{name}: {role.adapter}{rank}, {len(role.layers)} layers, {trained}")
        lines += [f"  {count:4d} x {kind}" for kind, count in count_kinds(role.layers).items()]
    processes = f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"
    settings = f"batch {plan.batch}, {plan.dtype}, {processes}, {plan.images} images per step"
    lines += ["", f"peak memory of each process in GiB ({settings}):"]
    columns = list(plan.memory.values())
    lines.append(f"  {'gradient checkpointing':<24}{'on':>10}{'off':>10}")
    for part in vars(columns[0]):
        lines.append(f"  {part:<24}" + "".join(_gibibytes(getattr(column, part)) for column in columns))
    name, totals = ("more than", [c.known for c in columns]) if plan.unknown else ("total", [c.total for c in columns])
    lines.append(f"  {name:<24}" + "".join(map(_gibibytes, totals)))
    if plan.unknown:
        lines += ["", f"The activations are unknown: {plan.unknown}. Measure a few steps on your device."]
    lines += [
        "",
        "Not counted: workspaces of kernels, the CUDA context, and sample grids, which decode 16 images at once.",
        "Text encoders are not needed in memory if the prompts come from a folder of `wadi embed`.",
    ]
    return "\n".join(lines)


def _gibibytes(number: int | None) -> str:
    return f"{'unknown':>10}" if number is None else f"{number / 2**30:10.2f}"


def count_kinds(layers: list[str]) -> dict[str, int]:
    """Count layers by their name within a block, without the block's number: ``attn1.to_q``, ``ff.net.2``, ..."""
    numbered = r"^.*(blocks|attentions|resnets|layers|refiner)\.\d+\."
    return dict(Counter(re.sub(numbered, "", name) for name in layers).most_common())
