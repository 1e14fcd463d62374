"""What the maths does on a GPU, where a pass over a large tensor costs more than what is computed in it."""
