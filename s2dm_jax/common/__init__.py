"""What every sub-package may use: errors, files, hashes, images, progress, tables."""
