"""Teach a one-step student a new subject from a few images.

Start with `training.py`; `data.py` reads the images and generates the prior.
"""
