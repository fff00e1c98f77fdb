"""Detect, name and localise what makes a mixed-precision run unstable."""
