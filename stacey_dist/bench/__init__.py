"""Measure what a step of the optimizers costs on this machine: `stacey-dist bench`.

It is installed, unlike benchmarks/, since users compare the optimizers on machines of their own.
"""
