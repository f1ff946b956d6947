"""What a caller asked for, and the order in which it is done."""
