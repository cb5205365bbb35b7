"""Predictors: what says which experts a coming layer will want, and how it is trained from traces."""
