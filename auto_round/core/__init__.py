"""Types and tensor functions. Knows no model, no file and no algorithm."""
