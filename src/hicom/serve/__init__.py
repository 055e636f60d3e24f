"""Serving models to others."""
