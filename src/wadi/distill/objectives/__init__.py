"""Losses as pure functions on tensors, one file each. They know nothing about accelerate, optimisers or files.

`vsd.py` is the paper's loss of the student: start there. `denoise.py` is that of the fake model.
"""
