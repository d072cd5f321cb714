"""The names that transformers imports to load a quantized checkpoint."""
