"""A student as an ordinary diffusers pipeline: load it, add to it, generate images with it.

`load` returns the pipeline of a run, an adapter or an export. `compose` adds tokens, LoRAs, another size, controls, more steps
or a start image, in the one order that works. `generate` generates images in memory, `files` writes them. Start with `load.py`.
"""
