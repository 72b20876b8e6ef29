"""Checkpoint folders: staged, flushed, published by one rename."""
