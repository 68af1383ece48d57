"""Models for other runtimes: ONNX, torch.export, OpenVINO; checked before they replace anything."""
