"""Teach the embedded teacher one subject from five pictures, and let its one-step student draw it: about two minutes on a CPU.

    python examples/dreambooth.py                # writes runs/green-apple and runs/green-apple.png

The same as `wadi dreambooth --teacher zoo --subject examples/subject/green-apple --prompt "sks apple" --out runs/green-apple
--prior_prompt "red apple"` and `wadi generate "sks apple, on a purple background" --lora runs/green-apple`.
"""

from pathlib import Path

import wadi.zoo
from wadi.backbones import from_pipeline
from wadi.distill.presets import preset
from wadi.extras.dreambooth import training
from wadi.extras.dreambooth.data import draw_prior, read_subject
from wadi.extras.lora.apply import apply_lora
from wadi.io.grids import grid, save_png
from wadi.pipelines.generate import draw, load

SUBJECT = Path(__file__).parent / "subject" / "green-apple"
OUT = Path("runs/green-apple")


def main() -> None:
    teacher = wadi.zoo.load_teacher()
    backbone = from_pipeline(teacher)
    pictures, shown = read_subject(SUBJECT, backbone.resolution)
    # what the teacher draws for the class now is what it shall still draw for it afterwards
    prior = draw_prior(backbone, ["red apple"], count=16, seed=0, steps=10, guidance_scale=2.5)
    config = training.DreamboothConfig(method="lorad", target_modules=preset("zoo").student.target_modules, lr=4e-3, steps=200)
    training.train(backbone, backbone.encode_images(pictures), backbone.encode(["sks apple"]), prior, config)
    training.save(teacher, backbone, config, OUT, {"dreambooth": {"prompt": "sks apple"}})

    student = load()  # an ordinary pipeline that draws in one step ...
    prompts = ["sks apple", "sks apple, on a purple background", "sks apple, on a red background", "red apple", "pizza"]
    before = draw(student, prompts, range(5)).pictures
    apply_lora(student, OUT)  # ... and now knows the subject, in its plain weights
    after = draw(student, prompts, range(5)).pictures
    labels = ["the subject", "student\nbefore", "student\nafter"]
    save_png(grid([shown[:5], before, after], labels, prompts, scale=2), OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
