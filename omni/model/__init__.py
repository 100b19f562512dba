"""Models in plain torch; see each module's head."""

from omni.model.lm.nanochat import load_nanochat

__all__ = ["load_nanochat"]
