"""Teach a model a new subject from a few images (DreamBooth, Ruiz et al., arXiv 2208.12242).

Start with `training.py`. `subject.py` reads the images, `prior.py` generates images of the subject's class, `losses.py` has the
two losses, and `saving.py` writes the result in its standard format.
"""
