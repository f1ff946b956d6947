"""Files that hold tensors: torch zip archives, pickles, safetensors. Read without running code."""
