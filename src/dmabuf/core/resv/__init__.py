"""Reservation objects and their lock."""
