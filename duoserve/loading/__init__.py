"""From a checkpoint to a running engine: memory, places, policy, and all of it put together."""
