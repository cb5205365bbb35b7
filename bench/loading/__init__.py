"""Packing and loading: checkpoints that are made for it, a worker, and the report."""
