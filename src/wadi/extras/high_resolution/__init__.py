"""Images larger than the training size, without training.

`resize.py` prepares a pipeline for a size: start there. `redilation.py` and `dispersion.py` are for U-Nets, `positions.py` for
transformers.
"""
