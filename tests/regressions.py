"""Cases that once failed, for test_fuzz.py: (name in its CHECKS, case)."""

REGRESSIONS = []
