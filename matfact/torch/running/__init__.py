"""Running a network on batches: modes, random numbers, side effects."""
