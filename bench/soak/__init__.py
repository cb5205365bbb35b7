"""Thousands of requests at a server: clients, what is looked at, and the report."""
