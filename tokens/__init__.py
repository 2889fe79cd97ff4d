"""Text as token ids: the tokenizer, prepared sets on disk, and the batches made of them."""
