"""Read prompts, put them into a reproducible order, and cache their embeddings.

Start with `reading.py`. `sources.py` reads each file format; `order.py` shuffles; `cache.py` is the folder that `wadi embed`
writes.
"""
