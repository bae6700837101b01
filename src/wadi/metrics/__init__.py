"""Metrics of images: functions on features and pixels that know nothing of pipelines, runs or protocols.

`features` and `clip` turn images into features, `resize` resizes them before, `cache` remembers the result. `frechet`,
`kernel`, `neighbours`, `diversity`, `clip` and `preference` turn features into metrics, `spread` says how much a metric varies
with the seeds, and `speed` times pipelines. Start with `frechet.py`. Importing this package imports none of its modules.
"""
