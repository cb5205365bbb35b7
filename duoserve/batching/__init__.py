"""What a service does next, by plain data: which requests to start, which to let wait, which to refuse."""
