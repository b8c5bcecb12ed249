"""Figures as people read them: tables for the terminal, plots, and one page."""
