"""LoRA files on a one-step student: read, translated and merged into the weights.

Start with `merge.py`.
"""
