"""Read and write files. Each format has one reader, and every file is written completely or not at all.

Start with `files.py` (writing) and `regular.py` (reading). `records.py`, `yaml_files.py`, `tensors.py` and `images.py` read one
format each; `figures.py`, `grids.py` and `markdown.py` write what people look at.
"""
