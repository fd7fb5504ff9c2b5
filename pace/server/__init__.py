"""`pace serve`: one process that speaks HTTP, and engines in processes of their own."""
