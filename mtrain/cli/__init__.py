"""The command line: flags in, a run out. Nothing imports this package."""
