"""What a shared pass over the experts is worth: rates by batch size, goodput, and their report."""
