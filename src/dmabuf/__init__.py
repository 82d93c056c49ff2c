"""The Linux DMA-BUF framework in user space."""
