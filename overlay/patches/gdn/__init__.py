"""GDN input projections: `patch` tells the story, `verdict` reads the source."""
