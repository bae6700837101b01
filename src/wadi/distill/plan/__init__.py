"""What a run adapts, trains and needs in memory, computed before it starts and without weights.

Start with `plan.py`. `memory.py` runs one real step on tensors without contents; `fitting.py` suggests settings that fit.
"""
