"""What the bytes of a buffer mean: pictures and tensors. Needs no domain."""
