"""Files read at a place, written whole or not at all, and read as JSON that says one thing."""
