"""Devices of kernel drivers, over ``dmabuf.uapi``.

DRM nodes (``drm``), sync objects (``syncobj``), cameras (``camera``) and the kernel's software timelines (``sw_sync``). The buffers that
they make are ordinary buffers.
"""
