"""Runs to the formats of other packages, and from them."""
