"""Fused operations of the shared layers, one operation a file."""
