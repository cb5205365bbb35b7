"""Loops that PyTorch's compiler makes for a CPU."""
