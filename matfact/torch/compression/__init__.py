"""Compress the layers of a network, within a budget or step by step."""
