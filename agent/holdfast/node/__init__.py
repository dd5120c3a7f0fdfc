"""The machine behind three verbs: check, observe, apply. Actions in, effects and receipts out."""

from holdfast.node.context import Context
from holdfast.node.machine import Node

__all__ = ["Context", "Node"]
