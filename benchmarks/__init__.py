"""Every speed claim as a command: `make bench`, or `python -m benchmarks NAME ...` for some."""
