"""What tests of several rooms share: oracles and checkpoints made on the spot."""
