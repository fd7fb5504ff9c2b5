"""The engine: text in, text out."""
