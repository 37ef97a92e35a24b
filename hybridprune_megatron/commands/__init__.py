"""What users run: one module per command of ``hybridprune``, and the door to them. Light: no torch on import."""
