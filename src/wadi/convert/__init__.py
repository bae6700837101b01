"""Students from other checkpoints: an adapter from two checkpoints, and the weights that the paper's authors released.

Start with `angles_between.py`, which has the mathematics, then `extract.py`. `low_rank.py` and `changes_as_lora.py` approximate
a student by a LoRA. Pipelines are written by `wadi.backbones.saving`.
"""
