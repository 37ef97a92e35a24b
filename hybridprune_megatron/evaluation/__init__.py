"""What a model gets right, what it really drops, and how long it takes: measured, on held-out samples."""
