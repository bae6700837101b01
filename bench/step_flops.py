"""Floating-point operations of one distillation step of a preset, and the hours of a run at a given speed. No weights are read.

    python bench/step_flops.py --model sd15
    python bench/step_flops.py --model sd15 --tflops 300      # the speed that your GPU reaches

The network is built from its public config with both adapters, from tensors that have shapes and no contents. Matrix products
and convolutions are counted; a multiplication and an addition are two operations. The hours are an estimate: they assume that
the GPU reaches ``--tflops`` during the whole run, and leave out sample images, checkpoints and text encoders.
"""

import argparse
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wadi import roles
from wadi.distill.objectives import with_defaults
from wadi.distill.plan.architecture import load_architecture
from wadi.distill.plan.memory import replace_by_fakes
from wadi.distill.plan.plan import outline_backbone
from wadi.distill.presets import preset

PAPER_STEPS, PAPER_IMAGES = 21_875, 128


def operations(network, images, width, role, train):
    """Return 10^12 operations of a pass over ``images`` images in ``role``; with ``train``, also those of its backward pass."""
    side, channels = network.config.sample_size, network.config.in_channels
    x = torch.empty(images, channels, side, side)
    condition, t = torch.empty(images, 77, width), torch.empty(images)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), roles.active(network, role):
        with torch.set_grad_enabled(train):
            out = network(x, t, encoder_hidden_states=condition, return_dict=False)[0]
        if train:
            out.sum().backward()
    return counter.get_total_flops() / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15", choices=["sd15", "sd21-base"], help="a preset")
    parser.add_argument("--tflops", type=float, default=100.0, help="operations per second that the GPU reaches, in 10^12")
    args = parser.parse_args()

    config, architecture = with_defaults(preset(args.model)), load_architecture(args.model)
    network = outline_backbone(architecture, replace(config, dtype="float32")).network

    width, batch = network.config.cross_attention_dim, config.batch
    guided = [batch if scale == 1 else 2 * batch for scale in (config.guidance_scale, config.fake.guidance_scale)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_by_fakes(network)
        step = {
            "student, forward and backward": operations(network, batch, width, "student", True),
            "teacher": operations(network, guided[0], width, None, False),
            "fake model": operations(network, guided[1], width, "fake", False),
            "fake model, forward and backward": config.fake.updates * operations(network, batch, width, "fake", True),
        }
    total = sum(step.values())
    print(f"{architecture.model}, batch {batch}, one step, 10^12 operations:")
    for name, count in step.items():
        print(f"  {name:<34}{count:8.1f}")
    print(f"  {'total':<34}{total:8.1f}   ({total / batch:.2f} per image)")
    print(
        f"estimates at {args.tflops:g} x 10^12 operations per second: {total / args.tflops:.2f} s for a step of {batch} images"
    )
    for images, gpus in ((batch, 1), (PAPER_IMAGES, 1), (PAPER_IMAGES, 8)):
        hours = PAPER_STEPS * images / batch * total / args.tflops / 3600 / gpus
        print(f"  {PAPER_STEPS:,} steps of {images} images, {gpus} GPU(s): {hours:.0f} h")


if __name__ == "__main__":
    main()
