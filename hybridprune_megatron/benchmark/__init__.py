"""Measured speed: the language model with and without reduction, and transformers on the same weights."""
