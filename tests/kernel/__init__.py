"""Tests that ask a real kernel. `make test-kernel` runs them in a guest, as root; CONTRIBUTING.md says how to write one."""
