"""The version, in one place. transformers and the servers ask for 0.5 or later."""

__version__ = "1.0.0.dev0"
