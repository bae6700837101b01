"""Prompts in, conditions out."""
