"""Compile every kernel without a GPU, and show what the compiler made of it: ``python -m ikd_fast.kernels.aot``."""
