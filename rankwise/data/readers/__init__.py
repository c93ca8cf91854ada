"""One module for each kind of file: a stream of bytes in; out come records and faults, each with its line."""
