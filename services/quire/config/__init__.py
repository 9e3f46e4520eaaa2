"""Configuration: frozen dataclasses whose fields are, once, the flag, its help and its docs."""
