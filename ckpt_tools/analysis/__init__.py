"""Owns the commands that write nothing: inspect, diff, interval."""
