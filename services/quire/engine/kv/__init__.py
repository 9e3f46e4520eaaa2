"""Which KV block holds what: allocation, reference counts, prefix cache."""
