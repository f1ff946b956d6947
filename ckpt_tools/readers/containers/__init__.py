"""Files that hold tensors: torch zip archives, pickles, safetensors. No code from them is run."""
