"""Tiled kernels of the losses: needed only to make the losses faster; each loss shows its formula as ``naive_*``."""
