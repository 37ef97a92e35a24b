"""Writes a trained model as a Hugging Face folder."""

#: What the marker of an exported folder says.
COMMAND = "scripts/export_hf.py"
