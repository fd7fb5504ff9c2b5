"""What can be wrong with what a user brought."""


class ModelError(ValueError):
    """A model that is not there or cannot be used. The message is one line and says what to do."""


class BackendError(RuntimeError):
    """A library did not do what a backend asked of it. The message says which, and what."""
