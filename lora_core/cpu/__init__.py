"""What makes the maths fast on a CPU: masks, products, the heap. Elsewhere torch's own does."""
