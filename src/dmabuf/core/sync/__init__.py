"""Fences that travel as descriptors."""
