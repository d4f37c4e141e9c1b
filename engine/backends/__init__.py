"""The libraries that an engine draws with: onnxruntime, OpenVINO, TensorRT, torch."""
