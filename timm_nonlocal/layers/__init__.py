"""Nonlocal blocks and stages, their affinities, and how they get into a network."""
