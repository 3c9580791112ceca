"""Recipes: the schema of each task (the TOML files are in configs/), how they are resolved and run."""
