"""A real Linux kernel as the judge: fetched or built once, kept outside of the tree, and made to run a command of this machine.

    python -m tools.kernel test [KERNEL] [-- PYTEST ARGUMENTS]    what `make test-kernel` runs: tests/kernel in a guest
    python -m tools.kernel run [-k KERNEL] -- COMMAND…            any command in a guest
    python -m tools.kernel prepare [KERNEL]                       only fetch or build

KERNEL is one of

- ``uml``: user-mode Linux, built from Debian's linux-source (4–7 minutes on two cores, once). A program of this machine, which starts in
  half a second. It has udmabuf, the system heap, sw_sync, vgem, debugfs. The default. x86-64 only.
- ``debian``: Debian's own kernel image in QEMU (107 MB, no build). It has vivid, and virtio_gpu for sync objects; no sw_sync. Starts in 4–6
  seconds under emulation.
- ``full``: linux-source built for QEMU with everything: CMA heap, vkms, vivid, virtio_gpu, sw_sync.

or the name of a directory in the cache. The cache is ``$DMABUF_KERNEL_CACHE``, else ``dmabuf-oracle`` in the user's cache directory
(``$XDG_CACHE_HOME``); it may be deleted at any time.
"""
