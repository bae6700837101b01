"""Learn a token for a relation between two things from images that share it.

Start with `training.py`; `token.py` is the file that it writes and the prompt that uses it.
"""
