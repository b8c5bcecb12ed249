"""Data that ships with PortNet; see ATTRIBUTION.md for whose it is."""
