"""Pooling without async scheduling: `patch` tells the story, `verdict` reads the source."""
