"""Toolkits that prepare and convert: each in a package of its own, reached through its entry point."""
