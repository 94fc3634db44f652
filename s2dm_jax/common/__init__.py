"""General code, independent of diffusion: errors, atomic files, hashing, progress, images, Markdown, command lines, the
version.
"""
