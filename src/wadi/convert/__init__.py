"""Students from other checkpoints: an adapter from two checkpoints, and the weights that the paper's authors released.

Start with `angles_between.py`, which has the mathematics, then `extract.py`. Pipelines are written by `wadi.backbones.saving`.
"""
