"""What users run: one module per command of ``hybridprune``, and their entry point. Light: no torch on import."""
