"""Sampling: from a caption to codes to an image."""
