"""What this project adds to a FLARE startup kit when it is provisioned."""

from fedgestalt_provisioning.builder import FedgestaltPolicyBuilder

__all__ = ["FedgestaltPolicyBuilder"]
