"""One module per command and API function."""
