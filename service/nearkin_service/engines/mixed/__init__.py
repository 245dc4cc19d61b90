"""Engine `mixed`: a bfloat16 pass finds candidates, an error bound proves that none is missing."""
