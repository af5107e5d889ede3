"""Measurements of the kernels and what is made of them. Not installed: run from the root of the repository."""
