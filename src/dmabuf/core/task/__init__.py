"""Who waits, and how each framework of tasks does it."""
