"""Images: from what people call them to verified, unpacked layers that overlayfs can stack."""
