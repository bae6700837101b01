"""Students from other checkpoints: an adapter from two checkpoints, and the weights that the paper's authors released.

Start with `extract.py`.
"""
