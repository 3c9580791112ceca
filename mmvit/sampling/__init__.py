"""Sampling: from a caption to codes to a picture."""
