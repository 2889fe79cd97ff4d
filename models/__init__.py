"""A model as a folder: Hugging Face names and files, finding and loading, GGUF."""
