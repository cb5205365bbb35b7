"""How bard and bard-fine are trained, and what is said of them."""
