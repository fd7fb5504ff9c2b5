"""The NumPy twins: the specification of every operation, and its oracle. One module an operation, the same name."""
