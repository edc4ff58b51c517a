"""Budgets over many layers: which method and how many values each of them gets."""
