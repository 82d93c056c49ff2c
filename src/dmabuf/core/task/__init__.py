"""The threads and tasks that wait, and how each framework of tasks does it."""
