"""A domain as programs and people see it: its buffers, the processes that have them open, the fences that block them, and the machine."""
