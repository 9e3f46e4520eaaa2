"""Modelled pods on a virtual clock, for the router to be measured and tested without engines."""
