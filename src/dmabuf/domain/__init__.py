"""The domain: the shared facts of all buffers, and the lives of the processes that take part."""
