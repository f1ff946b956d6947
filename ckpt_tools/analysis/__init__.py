"""Answers that write nothing: inspect, diff, interval."""
