"""Reading and writing files: outputs that appear whole, safetensors, torch archives, JSON lines."""
