"""Held-out measures and reports."""
