"""A soak of ordinary use, with everything at once.

Processes come and go, make one domain grow, allocate, send and receive, read and write, signal and wait, merge sync files, attach devices,
open buffers by name, fork, and are killed at random moments. Everything they do is ordinary, so every error that is not on an operation's
list (`operations.py`, with the reason for each), every torn read without an error, every wait without an end, and everything that is left
when all are gone is a fault of the library.

    python -m tests.soak --seconds 20 --seed 7

The supervisor (`supervisor.py`) starts the workers (`worker.py`), kills them and looks after them. It uses the library only in
children of its own. The seed decides what the processes do and when they are killed; the kernel decides how they interleave.
"""
