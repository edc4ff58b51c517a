"""Solvers: pure functions of arrays."""
