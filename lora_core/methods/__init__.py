"""What an adapter adds to a layer, and where it starts."""
