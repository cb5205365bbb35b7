"""The HTTP server, OpenAI's dialect: needs the extra ``serve``, and is imported by ``duoserve serve`` alone."""
