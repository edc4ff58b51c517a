"""Factorized layers, and the matrix view of a network's layers."""
