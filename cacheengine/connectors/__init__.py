"""Adapters between the cache engine and serving engines."""
