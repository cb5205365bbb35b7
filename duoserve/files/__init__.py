"""Reads files by position, writes them whole or not at all, and parses JSON strictly."""
