"""The input GEMMs of DeepSeek-V4: `patch` tells the story, `verdict` reads the source."""
