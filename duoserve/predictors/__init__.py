"""Predictors of the experts that coming layers will want, and their training on traces."""
