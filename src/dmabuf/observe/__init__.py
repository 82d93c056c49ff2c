"""What programs and people see of a domain: its buffers, who holds them, which fences are in the way, and what the machine offers."""
