"""Sensitivity of a loss to weights or outputs."""
