"""What can be wrong with a checkpoint."""


class UnsupportedModel(ValueError):
    """The checkpoint asks for something this engine does not compute."""
