"""Tiled kernels of the losses; read them only to make the losses faster."""
