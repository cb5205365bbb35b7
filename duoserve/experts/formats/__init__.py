"""The quantized formats that checkpoints have, each read into the one layout of a packed row."""
