"""Show results: plain data in, terminal text out. No torch here."""
