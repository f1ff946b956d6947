"""ckpt-tools: what training leaves on disk becomes what people load."""

__version__ = "0.1.0"
