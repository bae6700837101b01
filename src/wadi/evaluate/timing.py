"""Speed and peak memory of generators, all timed in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from wadi.backbones import from_pipeline
from wadi.evaluate.generators import Generator, require_same_family
from wadi.evaluate.peak_memory import peak_mib
from wadi.metrics.speed import TimedPipeline, measure_speed
from wadi.pipelines.generate import Sampling, generate_images


def time_generators(
    generators: Sequence[Generator], prompts: Sequence[str], repeats: int = 20, batch: int = 8, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return the speed of each generator. All are timed in one run and take turns: see `wadi.metrics.speed`.

    Raises:
        WadiError: if they are of different model families.
    """
    pipelines = {generator.key: generator.open() for generator in generators}
    first, *others = pipelines.values()
    for other in others:
        require_same_family(first, other)
    batch_prompts = [prompts[i % len(prompts)] for i in range(batch)]

    def timed_pipeline(generator: Generator) -> TimedPipeline:
        pipeline = pipelines[generator.key]

        def call(count: int) -> None:
            sampling = Sampling(generator.steps, generator.guidance_scale, batch=count)
            generate_images(pipeline, batch_prompts[:count], range(count), sampling)

        modules = tuple(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
        return TimedPipeline(call, from_pipeline(pipeline).network, modules)

    timed_pipelines = {generator.key: timed_pipeline(generator) for generator in generators}
    speeds = []
    for generator, speed in zip(generators, measure_speed(timed_pipelines, repeats, batch, device), strict=True):
        timed = timed_pipelines[generator.key]

        def call(timed: TimedPipeline = timed) -> None:
            timed.call(batch)

        # Measured for each pipeline alone, because all of them are in this process.
        memory = peak_mib(call, (timed.network, *timed.modules), device)
        speeds.append({**asdict(speed), "name": generator.name, "peak_memory_mib": memory})
    return speeds
