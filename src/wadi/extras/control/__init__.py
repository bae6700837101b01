"""Control images: put a ControlNet, T2I-Adapter or IP-Adapter on a pipeline, make condition images, and train a ControlNet.

Start with `pipeline.py`, which puts a control on a pipeline; `conditions.py` makes the images it looks at, `training.py` trains
one, and `agreement.py` measures how well images follow their conditions.
"""
