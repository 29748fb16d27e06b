"""Plugins for the programs that people train with. Nothing else in the package imports them."""
