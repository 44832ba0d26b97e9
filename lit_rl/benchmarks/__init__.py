"""Benchmarks: commands that print and keep numbers, apart from the tests."""
