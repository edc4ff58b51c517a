"""Dispatch: applying a product by its factors or by its dense matrix."""
