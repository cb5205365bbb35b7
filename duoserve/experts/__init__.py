"""Where weights are: checkpoints, packed experts in RAM and on disk, the slots, and the copies between them."""
