"""Images: from the names that people write to verified, unpacked layers that overlayfs can stack, and out again.

Subpackages, from top to bottom; each imports only what stands below it (see pyproject.toml):

    builds             `[images.*]` of a state: build an image with buildah; collect the images of a bundle
    incoming           bring images in: from registries, archives, layouts and root file systems
    outgoing           hand images out: archives, layouts, pushes; images of what containers have become
    kept               the store: names, manifests, layers, how a path is looked up in them, what is deleted when
    registry           skopeo and HTTP requests, and what their errors mean
    unpacking          the archive of a layer → its directory, in a locked-down process, and back again
    formats            OCI layouts, docker-archives, bundles, manifests and references, read and written
    disk               locks and files that are written whole
"""
