"""What an adapter adds to a layer, and where it starts. `base.py` is the contract, `registry.py` the list."""
