"""Importers: devices that use buffers by DMA address, and what every such device needs."""
