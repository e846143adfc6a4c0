"""Commands: one module each, `python -m launch.<command> --help`."""
