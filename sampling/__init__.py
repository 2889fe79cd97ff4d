"""Generate text with a model: continuations, conversations, the chat page."""
