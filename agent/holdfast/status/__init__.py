"""(Spec, Observed, History, Plan) → Status, and the preview of a plan as steps that a person reads. Pure."""

from holdfast.status.app_state import AppStatus, ContainerStatus, InstanceStatus, Status, make_status
from holdfast.status.preview_text import plan_json

__all__ = ["AppStatus", "ContainerStatus", "InstanceStatus", "Status", "make_status", "plan_json"]
