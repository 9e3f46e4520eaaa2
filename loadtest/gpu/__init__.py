"""What one GPU reaches of what it could: `python -m loadtest.gpu`, under ten minutes."""
