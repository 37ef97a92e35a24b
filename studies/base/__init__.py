"""Makers of the base weights and the data that the demo and the study start from."""
