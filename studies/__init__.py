"""Work of the authors on the method: not installed, run from a checkout."""
