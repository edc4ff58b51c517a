"""Run a network on batches: modes, random numbers, what a pass leaves behind."""
