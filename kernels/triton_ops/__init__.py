"""Triton kernels and their launchers, one file an operation; imported only when a launcher is wanted."""
