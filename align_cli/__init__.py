"""Language-model alignment experiments, composed by Hydra, from a laptop CPU to ZeRO-3 ranks."""

__version__ = "0.1.0"
