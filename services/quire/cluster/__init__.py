"""What every process of a cluster does alike: calls under its token, probes, metrics, its end."""
