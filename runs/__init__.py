"""What all commands share: options, processes, run folders, checkpoints, loading."""
