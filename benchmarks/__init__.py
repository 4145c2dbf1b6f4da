"""How fast the ops are: ``dlkernels bench``, and ``pytest benchmarks``."""
