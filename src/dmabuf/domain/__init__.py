"""The domain: the state that processes share, in one file, and the slots of the processes that take part."""
