"""Apply LoRA files and DreamBooth adapters to the weights of a pipeline.

Start with `apply.py`. It locates the file (`locate.py`), reads it (`file.py`, `entries.py`), finds the layer that each tensor
changes (`names.py`, `changes.py`) and computes the change (`delta.py`). `training.py` attaches a new LoRA and writes it.
"""

ADAPTER_NAME = "customisation"  # while it is attached to a network
