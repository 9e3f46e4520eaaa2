"""Which pod should decode a request, and whether another one should prefill it."""
