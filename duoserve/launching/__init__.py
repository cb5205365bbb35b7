"""How passes are launched: op by op, recorded, compiled, or as one graph."""
