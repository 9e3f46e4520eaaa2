"""What the outside speaks: OpenAI wire types, errors, sampling parameters."""
