"""From a plan to a proven, published directory."""
