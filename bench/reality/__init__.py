"""Runs from a cold disk beside replays of the same routing."""
