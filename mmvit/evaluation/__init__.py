"""Evaluation: how good a trained model is, on held-out data."""
