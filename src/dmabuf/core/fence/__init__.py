"""Fences: one object each, and what is made of several."""
