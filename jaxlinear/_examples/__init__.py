"""Gradients of single examples: their norms, and their clipped sum."""
