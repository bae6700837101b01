"""Learn a token for a relation between two things, from images that all show it (ReVersion, arXiv 2303.13495).

Start with `training.py`, whose `learn_token` does it all; `loop.py` has one update, and `loss.py` the two formulas of the
paper. `token_file.py` reads and writes token files, of other tools too, and `vocabulary.py` adds a token to a pipeline.
"""
