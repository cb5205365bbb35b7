"""One model for many callers: who is started when, and how their text gets to them."""
