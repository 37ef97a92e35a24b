"""Step time and memory of training runs on many GPUs, counted from the configuration."""
