"""Distillation: a many-step teacher becomes a one-step student.

`step.py` is one training step, `loop.py` the run around it: start with these two. `objectives/` has the losses, `config.py` the
settings, `plan/` what a run needs before it starts.
"""
