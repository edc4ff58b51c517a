"""Compression of a network's layers, with a density, a budget, or gradually."""
