"""The machine behind three verbs: check, observe, apply. Actions in, effects and receipts out."""

from holdfast.node.machine import Node
from holdfast.node.rig import Rig

__all__ = ["Node", "Rig"]
