"""LoRA linears: `patch` tells the story, `verdict` reads the source."""
