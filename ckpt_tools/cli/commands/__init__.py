"""One module a command: ``command``, a Click command, and ``SUMMARY``, its line in ``--help``."""
