"""Sources of sparse models, one file each."""
