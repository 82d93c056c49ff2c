"""What tests lean on: child processes and the search for leaks."""
