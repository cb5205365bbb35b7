"""Load tests of OpenAI-compatible servers: what is asked, what comes back when, and what that amounts to."""
