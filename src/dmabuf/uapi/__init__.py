"""The kernel's ioctls: numbers, structures, and calls with the restart rules (semantics 5.1–5.14). The only place with ``ioctl``.

``table`` has every number and structure, for clients and servers. ``call`` makes the system call: it restarts the call, runs Python's
signal handlers meanwhile, and loses no descriptor that the kernel returned. The other modules make the calls, one module for each device:
``dma_buf``, ``sync_file``, ``heap`` (dma-heaps and udmabuf), ``sw_sync``, ``drm``, ``syncobj``, ``v4l2``.
"""
