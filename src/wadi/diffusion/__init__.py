"""The mathematics of diffusion that every model family shares. No network, no adapter.

`process.py` is the noising process: start there. `schedulers.py` translates between it and diffusers' schedulers, and
`autoencoder.py` between latents and pixels.
"""
