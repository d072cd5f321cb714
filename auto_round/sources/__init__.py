"""Where blocks of weights come from."""
