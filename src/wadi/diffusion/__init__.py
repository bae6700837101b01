"""The mathematics of diffusion that all model families share. It knows no networks and no adapters.

Start with `process.py`, the noising process. `schedulers.py` builds diffusers' schedulers from it, and `autoencoder.py` turns
images into latents and back.
"""
