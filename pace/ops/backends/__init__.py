"""The backends, a file each: it registers itself for the operators that it serves."""
