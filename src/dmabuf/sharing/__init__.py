"""Passing buffers, fences and domains to other processes: over sockets, through multiprocessing, and by name; and remote calls."""
