"""Places that keep frames under keys: disk slot files, Redis."""
