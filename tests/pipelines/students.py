"""Students of the tests of pipelines, and how their images are compared."""

import numpy as np
import torch

from wadi import roles
from wadi.backbones import load_pipeline
from wadi.lorad import LoRaDConfig
from wadi.pipelines.generate import generate_images


def pixels(image):
    return np.asarray(image).astype(int)


def same_image(one, other, off=1):
    """Whether two images are equal up to ``off`` in each channel; 1 is the rounding of a pixel."""
    return pixels(one).shape == pixels(other).shape and np.abs(pixels(one) - pixels(other)).max() <= off


def one_image(pipeline, prompt="red apple", seed=1):
    return generate_images(pipeline, [prompt], [seed]).images[0]


def save_student(timestep, teacher, folder):
    """Write the adapter of a student whose angles are about a tenth, and return its folder."""
    network = load_pipeline(teacher).unet
    roles.attach(network, "student", LoRaDConfig(r=4, target_modules=r".*(to_q|to_k|to_v|ff\.net\.2)"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters(network, "student").values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    roles.save(network, "student", folder, extra={"timestep": timestep, "teacher": str(teacher)})
    return folder
