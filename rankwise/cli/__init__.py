"""The command line: one short module for each command, imported only when chosen."""
