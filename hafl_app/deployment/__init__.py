"""Real SuperLink and SuperNodes: credentials, the fence before the SuperLink, a local trial."""
