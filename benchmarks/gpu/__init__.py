"""One command that proves the library on a GPU machine: `python -m benchmarks.gpu --out DIR`.

The command itself, steps, their time and their record, needs nothing but the standard library: what breaks an import
breaks a step, not the run.
"""
