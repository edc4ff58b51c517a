"""What enters the layers of a network, all at once or one after the other."""
