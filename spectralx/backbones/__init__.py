"""Vision transformers that SpectralX adapts, and the decoders of their masked autoencoders."""
