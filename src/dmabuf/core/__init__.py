"""The framework: one object of the kernel a module, its contract as the module's docstring."""
