"""Benchmarks: every figure is a ratio to the C limit or the peer, measured in the same run (`make bench`)."""
