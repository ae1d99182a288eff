"""Small commands: generate, merge, grade, and our decoders in lm-evaluation-harness."""
