"""Devices, and the processes that share a run. Every synchronisation is an explicit call.

`ranks.py` is what processes agree on, `device.py` the device and its memory. Start with `ranks.py`.
"""
