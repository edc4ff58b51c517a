"""Training of compressed networks on fixed supports."""
