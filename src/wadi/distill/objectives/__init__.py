"""Losses as pure functions on tensors, one file each. They know nothing of accelerate, optimisers or files."""
