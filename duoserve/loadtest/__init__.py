"""Load tests of OpenAI-compatible servers: the requests, the times of their answers, and figures of these."""
