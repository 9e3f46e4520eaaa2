"""Keeps a fleet of engine replicas on a Ray cluster. The only package that imports ray."""
