"""Generate images larger than the training size, without training.

Start with `resize.py`, which prepares a pipeline for a size. `redilation.py` and `dispersion.py` change the convolutions of
U-Nets, `positions.py` the positions of transformers.
"""
