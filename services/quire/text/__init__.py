"""Text to token ids and back: tokenizer, chat template, detokenizer, stop strings.

Everything here is a pure function of its inputs: replaying the same token ids gives the same text,
which is what lets a request move to another pod in the middle of a character or a stop string.
"""
