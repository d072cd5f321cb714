"""Kernel libraries, one file each."""
