"""Benchmarks: figures with what they are compared to, measured in one run. Never part of the tests."""
