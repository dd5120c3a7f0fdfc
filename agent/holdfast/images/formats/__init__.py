"""Read and write files that hold images. Nothing here knows the store."""
