"""Benchmarks: official files in, answers kept line by line, scores with intervals out."""
