"""A student as an ordinary diffusers pipeline: load it and generate images.

Start with `generate.py`.
"""
