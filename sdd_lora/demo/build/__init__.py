"""The programs that made the embedded model. Nobody needs them to use the package."""
