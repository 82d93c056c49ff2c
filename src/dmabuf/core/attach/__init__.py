"""Devices on a buffer."""
