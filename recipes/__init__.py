"""Recipes: scripts that run as they are, and the worlds that experiments and benchmarks share."""
