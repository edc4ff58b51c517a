"""Layers that hold products, and layers of networks as matrices."""
