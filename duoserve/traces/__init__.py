"""Traces: the choices of a model's routers, recorded or made up, in memory and on disk."""
