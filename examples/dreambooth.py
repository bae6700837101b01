"""Teach the embedded teacher one subject from five images, and let its one-step student generate it: two minutes on a CPU.

    python examples/dreambooth.py                # writes runs/green-apple and runs/green-apple.png

This is the same as `wadi dreambooth --teacher zoo --subject examples/subject/green-apple --prompt "sks apple"
--out runs/green-apple --prior-prompt "red apple"`, followed by `wadi generate "sks apple, on a purple background"
--lora runs/green-apple`.
"""

from pathlib import Path

import wadi.zoo
from wadi.backbones import from_pipeline
from wadi.distill.presets import preset
from wadi.extras.dreambooth.config import DreamboothConfig
from wadi.extras.dreambooth.prior import generate_prior
from wadi.extras.dreambooth.saving import save_subject
from wadi.extras.dreambooth.subject import read_subject
from wadi.extras.dreambooth.training import train_subject
from wadi.extras.lora.apply import apply_lora
from wadi.io.grids import compose_grid, save_png
from wadi.pipelines.generate import generate_images
from wadi.pipelines.load import load

SUBJECT = Path(__file__).parent / "subject" / "green-apple"
OUT = Path("runs/green-apple")


def main() -> None:
    teacher = wadi.zoo.load_teacher()
    backbone = from_pipeline(teacher)
    tensors, images = read_subject(SUBJECT, backbone.resolution)
    # The teacher must go on generating the class as it does now.
    prior = generate_prior(backbone, ["red apple"], count=16, seed=0, steps=10, guidance_scale=2.5)
    config = DreamboothConfig(method="lorad", target_modules=preset("zoo").student.target_modules, lr=4e-3, steps=200)
    train_subject(backbone, backbone.encode_images(tensors), backbone.encode(["sks apple"]), prior, config)
    save_subject(teacher, backbone, config.method, OUT, {"dreambooth": {"prompt": "sks apple"}})

    student = load()  # an ordinary pipeline that generates in one step
    prompts = ["sks apple", "sks apple, on a purple background", "sks apple, on a red background", "red apple", "pizza"]
    before = generate_images(student, prompts, range(5)).images
    apply_lora(student, OUT)  # the student's weights now include the subject
    after = generate_images(student, prompts, range(5)).images
    labels = ["the subject", "student\nbefore", "student\nafter"]
    save_png(compose_grid([images[:5], before, after], labels, prompts, scale=2), OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
