"""Models: checkpoints on disk, and the architectures that run them."""
