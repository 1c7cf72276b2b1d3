"""Tests against the sources of released vLLM versions. None of upstream's code is stored here: it is fetched."""
