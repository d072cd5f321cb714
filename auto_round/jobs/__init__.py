"""Orchestration: the loop and what runs around it."""
