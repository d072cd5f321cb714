"""All that knows transformers models and safetensors files."""
