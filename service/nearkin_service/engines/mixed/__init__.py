"""Engine `mixed`: a quick pass finds candidates, an error bound proves that none is missing."""
