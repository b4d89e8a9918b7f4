"""Attacks on what a training releases: who was in it, and what the scans looked like."""
