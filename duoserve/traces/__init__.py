"""Traces: what the routers of a model have chosen, recorded or made up, in memory and on the disk."""
