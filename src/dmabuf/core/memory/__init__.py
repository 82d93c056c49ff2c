"""Memory as devices and drivers see it."""
