"""Prompts: read from files, folders and data sets, in a reproducible order, and the cache of their embeddings.

Start with `prompts.py`. `sources.py` reads each file format; `cache.py` is the folder that `wadi embed` writes.
"""
