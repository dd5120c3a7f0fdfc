"""Images: from what people call them to verified, unpacked layers that overlayfs can stack, and out again.

What is kept     store   names, manifests, layers: the room's face    image, disk, manifests, archives
                 layers ← unpack ← worker ← tree ← tarstream          one process for each layer; recipe: the way back
                 lookup   a stack of layers, read without mounting    collect: what goes when the disk is full
What comes       pull ← fetch ← proxy, skopeo, faults; head           references, versions, transfers
                 build ← buildlog, buildah ← fence; outside, hazards  bundle ← gather
What goes out    write    archives and layouts                        commit ← pack: what a container has become
"""
