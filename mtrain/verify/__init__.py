"""Proof: files are what was saved, checkpoints are equal, and the conversion keeps precision."""
