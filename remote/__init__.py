"""Caches that lie on an object store: copied there and back, trained from, harvested to."""
