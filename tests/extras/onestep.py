"""Small one-step pipelines of every family, and a record of the calls of their networks."""

import torch

from backbones import small_pipelines
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import one_step_scheduler

FLOWS = ["sd3", "flux", "sana", "lumina2", "chroma", "qwen-image", "flux2", "flux2-klein"]
FAMILIES = ["sd1", "sd2", "sdxl", "pixart-sigma", *FLOWS]
RESOLUTIONS = {**small_pipelines.RESOLUTIONS, "sana": (64, 64)}
TIMESTEP = 800


def students(tmp_path_factory):
    """``student(name)``: a pipeline with a student's own scheduler; its weights are pipelines once."""
    pipelines = {}

    def student(name):
        if name not in pipelines:
            pipeline = small_pipelines.make(name, tmp_path_factory.mktemp(name))
            backbone = from_pipeline(pipeline, RESOLUTIONS.get(name))
            pipeline.scheduler = one_step_scheduler(pipeline.scheduler, TIMESTEP)
            backbone.remember_resolution()
            pipelines[name] = pipeline, pipeline.scheduler
        pipeline, pipeline.scheduler = pipelines[name]
        return pipeline

    return student


class network_calls:
    """``with network_calls(pipeline) as calls:`` records ``(timestep, input)`` of every evaluation of the network."""

    def __init__(self, pipeline):
        self.network = from_pipeline(pipeline).network
        kind, scale = type(self.network).__name__, 1 / (self.network.config.get("timestep_scale") or 1)
        if kind.startswith(("Flux", "Chroma", "QwenImage")):
            self.time = lambda t: 1000 * t
        elif kind.startswith("Lumina2"):
            self.time = lambda t: 1000 * (1 - t)
        else:
            self.time = lambda t: scale * t

    def __enter__(self):
        calls = []

        def note(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            t = kwargs["timestep"] if "timestep" in kwargs else args[1]
            calls.append((self.time(float(torch.as_tensor(t).flatten()[0])), x.detach().clone()))

        self.hook = self.network.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    def __exit__(self, *_):
        self.hook.remove()


def randomise(parameters, spread):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
