"""Training data: ratings converted into a split, and the negatives and batches drawn from it."""
