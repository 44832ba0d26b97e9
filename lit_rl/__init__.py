"""lit_rl: sequence models in reinforcement learning on PyTorch Lightning and TorchRL."""

__version__ = "0.1.0"
