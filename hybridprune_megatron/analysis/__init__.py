"""Looks into a model that reduces: how sparse and how stable its scores are, what it keeps, what dropping loses."""
