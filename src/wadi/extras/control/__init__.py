"""Condition images: ControlNets, T2I-Adapters and IP-Adapters on a teacher or a student, and training a ControlNet.

`pipeline.py` puts a control on a pipeline: start there. `training.py` trains one, `agreement.py` measures it.
"""
