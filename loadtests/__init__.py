"""Benches: each prints its ceiling and ends with one line of JSON."""
