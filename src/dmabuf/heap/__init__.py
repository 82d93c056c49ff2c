"""Where buffers' memory comes from: a module a heap, and `recommended` to say which is the default, and why."""
