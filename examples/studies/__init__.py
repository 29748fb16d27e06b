"""Studies: training runs that differ in one thing at a time, from a YAML file to a page with its numbers."""
