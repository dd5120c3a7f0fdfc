"""Build images with buildah, and collect the images of a bundle."""
