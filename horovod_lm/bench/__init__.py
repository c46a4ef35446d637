"""Benchmarks: each a ratio of interleaved runs on one machine."""
