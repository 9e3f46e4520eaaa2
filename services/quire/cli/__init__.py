"""The `quire` command. A sub-command's module is imported only when it is chosen."""
