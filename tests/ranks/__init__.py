"""Tests of several processes that carry out one command, started as their users start them."""
