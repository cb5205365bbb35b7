"""Kernels and the link of a GPU: timed, checked, tuned and reported."""
