"""What a service does next, by plain data: whom to start, whom to let wait, whom to refuse."""
