"""How the embedded teacher was made: sprites, autoencoder, teacher, judge and export, each a stage that can be resumed.

Start with `stages.py`.
"""
