"""More uses of a one-step student: control images, relations, subjects, larger images, LoRA, image to image, more steps.

Each takes an ordinary diffusers pipeline and returns one, or changes it in place. Start with `steps.py`, the smallest.
"""
