"""Random input to everything that believes nothing: messages of peers, descriptors, and files. See ``targets``."""
