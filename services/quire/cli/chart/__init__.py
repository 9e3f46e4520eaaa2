"""The Helm chart's values: their schema and their reference, from the commands' own options."""
