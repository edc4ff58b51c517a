"""Saving and loading of networks."""
