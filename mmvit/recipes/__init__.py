"""Recipes: what a TOML file may hold for each task, and how its settings are resolved."""
