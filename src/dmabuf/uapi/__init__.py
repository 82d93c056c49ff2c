"""The kernel's ioctls: numbers, structures, and calls with the restart rules (semantics 5.1–5.14). The only place with ``ioctl``.

``table`` has every number and structure, for both sides: what a client packs a server unpacks. ``call`` makes the system call: restarts it,
runs Python's signal handlers meanwhile, and loses no descriptor that the kernel has given. The other modules are the calls themselves, one
module a device: ``dma_buf``, ``sync_file``, ``dma_heap``, ``udmabuf``, ``sw_sync``, ``drm``, ``syncobj``, ``v4l2``.
"""
