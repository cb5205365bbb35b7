"""Will a model fit, and how fast will it be: answered before it is downloaded."""
