"""Evaluation: what a trained model is worth, on data that it has not seen."""
