"""Owns where the files of a checkpoint lie: on this disk, on other machines."""
