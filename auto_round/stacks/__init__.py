"""Layers side by side, rounded together by what their inputs are like."""
