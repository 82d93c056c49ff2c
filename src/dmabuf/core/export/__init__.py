"""Exporting: buffers whose memory and behavior are an object of the program."""
