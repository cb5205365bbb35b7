"""Plans: whether a model will fit and how fast it will be, before it is downloaded."""
