"""The parameters that a run will train and the memory of a step, computed before the run starts and without weights.

Start with `plan.py`. `architecture.py` reads a model's config files, `memory.py` runs one step on tensors without contents, and
`fitting.py` suggests settings that fit into the memory of a device.
"""
