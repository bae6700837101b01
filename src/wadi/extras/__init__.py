"""What else a one-step generator can do: control images, learned relations, subjects, high resolution, LoRA, more steps.

Each takes an ordinary diffusers pipeline and returns one. `steps.py` is the smallest: start there.
"""
