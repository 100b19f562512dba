"""Repeatable recipes of training data that omni's own models are made of."""
