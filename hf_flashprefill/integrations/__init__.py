"""Where other programs take the sparse prefill in. Each needs that program to be installed; the package itself does not."""
