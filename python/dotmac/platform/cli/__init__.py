"""The command line, `dotmac`."""
