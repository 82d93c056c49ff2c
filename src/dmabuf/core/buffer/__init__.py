"""One buffer in this process: its handles, its memory and who it is."""
