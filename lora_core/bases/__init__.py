"""How a frozen weight is held: dense, in 4 bits, or where accelerate keeps it."""
