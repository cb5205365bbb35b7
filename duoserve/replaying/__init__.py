"""Replays: the scheduler at work on a trace and a virtual clock, so that policies and machines can be compared."""
