"""What a run needs in addition to its loop: optimizers, processes, checkpoints, log, estimate."""
