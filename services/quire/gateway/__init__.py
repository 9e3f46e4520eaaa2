"""The gateway: OpenAI HTTP in, tokens out. Imports neither torch nor transformers."""
