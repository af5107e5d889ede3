"""`python -m benchmarks.scaling`: bytes, compute and communication of each parallel algorithm on ranks that are not here."""
