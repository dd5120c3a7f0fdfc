"""(Spec, Observed, History, Plan) → Status, and the preview of a plan as steps that a person reads. Pure."""

from holdfast.status.road import plan_json
from holdfast.status.standing import AppStatus, ContainerStatus, InstanceStatus, Status, make_status

__all__ = ["AppStatus", "ContainerStatus", "InstanceStatus", "Status", "make_status", "plan_json"]
