"""Statistics of the inputs of a network's layers, at once or sequentially."""
