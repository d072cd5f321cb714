"""Data types, one file each."""
