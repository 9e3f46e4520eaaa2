"""A pod's worker: gRPC around one engine."""
