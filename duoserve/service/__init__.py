"""One model for many callers of an asyncio program."""
