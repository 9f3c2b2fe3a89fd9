"""Part 3: another number format for the weights of products."""
