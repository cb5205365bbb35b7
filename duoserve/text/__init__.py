"""From text to tokens and back: tokenizers, chats, channels, stop strings."""
