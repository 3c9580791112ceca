"""Recipes: what a TOML file holds for each task, how its settings are resolved, and how its script is run."""
