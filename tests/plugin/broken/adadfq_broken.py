"""Fails to import, as a plugin does whose own dependency is missing."""

raise ImportError("adadfq_broken needs a package that is not installed")
