"""Models for other runtimes: ONNX, torch.export, OpenVINO; checked before they replace anything."""

FORMATS = ("onnx", "torch-export", "openvino")
"""The formats that ``vlprune export --to`` accepts."""
