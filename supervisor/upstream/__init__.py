"""HTTP to the provider: one connection per stream, on trio."""
