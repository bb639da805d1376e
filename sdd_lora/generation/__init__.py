"""Drawing: pipelines with adapters, images with a manifest, methods."""
