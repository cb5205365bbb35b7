"""The HTTP server in OpenAI's dialect. It needs the extra ``serve``, and only ``duoserve serve`` imports it."""
