"""Measurements, one command a subject; BENCHMARKS.md is made from what they write."""
