"""The training of the embedded teacher: sprites, autoencoder, teacher, judge and export, each a stage that can be resumed.

Start with `stages.py`.
"""
