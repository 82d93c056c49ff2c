"""Drivers' devices from Python, thin over ``dmabuf.uapi``: DRM nodes (``drm``), sync objects (``syncobj``), cameras (``camera``) and the
kernel's software timelines (``sw_sync``). What they make are ordinary buffers."""
