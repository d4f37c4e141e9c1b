"""The folders this project reads and writes: manifests, hashes, atomic writes, the hub, TensorRT plans. No torch."""
