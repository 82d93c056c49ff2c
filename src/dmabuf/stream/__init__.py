"""Streams: rings of buffers that a producer hands to readers in other processes."""
